//! The harness of the integration tests.

pub mod bare;
pub mod linux;
pub mod load;
pub mod stored;
