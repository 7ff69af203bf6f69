//! What benches have in common: samples, rows with what they are compared with, the host's facts, and what is made of them.
//!
//! ```text
//!  a bench ── Row ──► Report ──► a table on the terminal
//!                        └─────► Record, one for each row, as JSON ──► figures (what has to be there), page and plot (docs/performance.md)
//! ```
//!
//! A bench runs where guests can, often not where its figures are read; so all that is needed to read one goes with its record: where it
//! was taken, on what host, by which command, beside what.
//!
//! Invariants: a record's format is in one place, [`record::Record`]; no time measured in the testbed is shown without a mark.

pub mod curve;
pub mod facts;
pub mod figures;
pub mod page;
pub mod plot;
pub mod record;
pub mod report;
pub mod stats;
