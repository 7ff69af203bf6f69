//! civic-tests.
