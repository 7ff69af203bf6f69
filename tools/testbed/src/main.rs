//! civic-testbed.
fn main() {}
