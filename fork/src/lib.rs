//! civic-fork.
