//! civic-devices.
