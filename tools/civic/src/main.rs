//! civic.
fn main() {}
