//! Sizes as people write them.

use std::fmt;
use std::str::FromStr;

/// A number of bytes, parsed from and shown as `512M`, `1G`, `1.5G`. Suffixes are powers of 1024; `M`, `MB` and `MiB`
/// mean the same, in either case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

const UNITS: [(&str, u32); 4] = [("T", 40), ("G", 30), ("M", 20), ("K", 10)];

/// The text was not a size in bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ByteSizeError {
    /// Not a number with an optional suffix.
    #[error("'{0}' is not a size such as 512M, 1G or 1.5G")]
    Syntax(String),
    /// More than 2^64 − 1 bytes.
    #[error("'{0}' is too large")]
    TooLarge(String),
    /// A fraction of a byte, such as `1.0001K`.
    #[error("'{0}' is not a whole number of bytes")]
    NotWhole(String),
}

impl FromStr for ByteSize {
    type Err = ByteSizeError;

    fn from_str(text: &str) -> Result<Self, ByteSizeError> {
        let syntax = || ByteSizeError::Syntax(text.to_owned());
        let split = text.find(|c: char| c != '.' && !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, suffix) = text.split_at(split);
        let suffix = suffix.trim_start().to_ascii_uppercase();
        let shift = match suffix.as_str() {
            "" | "B" => 0,
            _ => {
                let unit = |&&(unit, _): &&(&str, u32)| matches!(suffix.strip_prefix(unit), Some("" | "B" | "IB"));
                UNITS.iter().find(unit).ok_or_else(syntax)?.1
            }
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
        // 18 digits keep `fraction << 40` and `10^18` within a u128.
        if whole.is_empty() || fraction.is_empty() || fraction.len() > 18 || fraction.contains('.') {
            return Err(syntax());
        }
        // Only digits are left, so a parse can only fail by size.
        let too_large = || ByteSizeError::TooLarge(text.to_owned());
        let whole = whole.parse::<u64>().map_err(|_| too_large())?;
        let part = u128::from(fraction.parse::<u64>().map_err(|_| too_large())?) << shift;
        let scale = 10_u128.pow(fraction.len() as u32);
        if !part.is_multiple_of(scale) {
            return Err(ByteSizeError::NotWhole(text.to_owned()));
        }
        let bytes = (u128::from(whole) << shift) + part / scale;
        u64::try_from(bytes).map(Self).map_err(|_| too_large())
    }
}

impl fmt::Display for ByteSize {
    /// The largest unit that needs no fraction; else one decimal of the largest unit reached.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(&(unit, shift)) = UNITS.iter().find(|&&(_, shift)| self.0 >> shift != 0) else {
            return write!(f, "{}", self.0);
        };
        let tenths = (u128::from(self.0) * 10) >> shift;
        if self.0.trailing_zeros() >= shift {
            write!(f, "{}{unit}", self.0 >> shift)
        } else {
            write!(f, "{}.{}{unit}", tenths / 10, tenths % 10)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_what_people_write() {
        let check = |text: &str, bytes: u64| assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        check("0", 0);
        check("4096", 4096);
        check("4096B", 4096);
        check("512M", 512 << 20);
        check("512m", 512 << 20);
        check("512 MiB", 512 << 20);
        check("1G", 1 << 30);
        check("1.5G", 3 << 29);
        check("2GB", 2 << 30);
        check("1T", 1 << 40);
        check("0.5K", 512);
    }

    #[test]
    fn refuses_the_rest() {
        for text in ["", "G", ".5G", "1.G", "1.2.3G", "-1G", "1X", "1GBB", "1 G G", "0x10", "1e9", "+1"] {
            assert_eq!(text.parse::<ByteSize>(), Err(ByteSizeError::Syntax(text.to_owned())), "{text}");
        }
        assert_eq!("99999999T".parse::<ByteSize>(), Err(ByteSizeError::TooLarge("99999999T".to_owned())));
        assert_eq!(
            "99999999999999999999".parse::<ByteSize>(),
            Err(ByteSizeError::TooLarge("99999999999999999999".to_owned()))
        );
        assert_eq!("1.0001K".parse::<ByteSize>(), Err(ByteSizeError::NotWhole("1.0001K".to_owned())));
    }

    #[test]
    fn shows_short_forms() {
        let check = |bytes: u64, text: &str| assert_eq!(ByteSize(bytes).to_string(), text);
        check(0, "0");
        check(1000, "1000");
        check(1 << 30, "1G");
        check(3 << 29, "1.5G");
        check((1 << 30) + 1, "1.0G");
        check(u64::MAX, "16777215.9T");
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in "\\PC{0,40}") {
            let _ = text.parse::<ByteSize>();
        }

        #[test]
        fn whole_units_round_trip(count in 0_u64..1 << 20, shift in prop::sample::select(vec![0_u32, 10, 20, 30, 40])) {
            let size = ByteSize(count << shift);
            let shown = size.to_string();
            // What is shown with a decimal is rounded down.
            if !shown.contains('.') {
                prop_assert_eq!(shown.parse::<ByteSize>().unwrap(), size);
            }
        }
    }
}
