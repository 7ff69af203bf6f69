//! civic-api.
