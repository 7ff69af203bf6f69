//! Samples and what is said of them.
//!
//! Quantiles are by nearest rank: each is a value that was measured, and with few samples the high ones are the greatest.

/// Values of one thing, in the order they were measured.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// Adds one.
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// All, in the order they were measured.
    pub fn values(&self) -> &[f64] {
        &self.0
    }

    /// How many.
    pub fn n(&self) -> usize {
        self.0.len()
    }

    /// The smallest value that at least `share` (0 to 1) of all do not exceed; NaN of nothing.
    pub fn quantile(&self, share: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = (share * sorted.len() as f64).ceil() as usize;
        sorted.get(rank.max(1) - 1).copied().unwrap_or(f64::NAN)
    }

    /// The median: of an even number, between the middle two.
    pub fn median(&self) -> f64 {
        let upper = |x: &[f64]| Self(x.iter().map(|v| -v).collect()).quantile(0.5);
        f64::midpoint(self.quantile(0.5), -upper(&self.0))
    }

    /// The greatest.
    pub fn max(&self) -> f64 {
        self.quantile(1.0)
    }

    /// How far the middle half of the samples is spread, as a share of the median.
    pub fn spread(&self) -> f64 {
        (self.quantile(0.75) - self.quantile(0.25)) / self.median()
    }
}

impl From<Vec<f64>> for Samples {
    fn from(values: Vec<f64>) -> Self {
        Self(values)
    }
}

impl FromIterator<f64> for Samples {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        Self(values.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_were_measured() {
        let s: Samples = [5.0, 1.0, 4.0, 2.0, 3.0].into_iter().collect();
        assert_eq!((s.n(), s.median(), s.max()), (5, 3.0, 5.0));
        assert_eq!((s.quantile(0.9), s.quantile(0.99), s.quantile(0.2), s.quantile(0.0)), (5.0, 5.0, 1.0, 1.0));
        let hundred: Samples = (1..=100).map(f64::from).collect();
        assert_eq!((hundred.quantile(0.9), hundred.quantile(0.99)), (90.0, 99.0));
    }

    #[test]
    fn the_median_of_an_even_number_is_between() {
        assert_eq!([4.0, 1.0, 3.0, 2.0].into_iter().collect::<Samples>().median(), 2.5);
        assert_eq!([7.0].into_iter().collect::<Samples>().median(), 7.0);
        assert!(Samples::default().median().is_nan());
    }

    #[test]
    fn spread_is_relative_and_ignores_outliers() {
        let s: Samples = [100.0, 90.0, 110.0, 100.0, 5000.0, 95.0, 105.0, 1.0].into_iter().collect();
        assert!((s.spread() - 0.15).abs() < 1e-9, "{}", s.spread());
    }
}
