//! Plots as SVG: for each row a range and a point on a logarithmic axis, and what it is compared with.
//!
//! ```text
//!  fork.pause        ──●────────        ◆
//!  fork.arm                ─●──
//!               └────┴────┴────┴────┴────┘  0.1 … 100 ms
//! ```

use std::fmt::Write;

/// Sizes in pixels.
const WIDTH: f64 = 900.0;
const LABELS: f64 = 300.0;
const RIGHT: f64 = 40.0;
const ROW: f64 = 20.0;
const TOP: f64 = 44.0;
const BOTTOM: f64 = 44.0;

/// A row of a plot. What is not above zero has no place on the axis and is left out.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// Its name.
    pub label: String,
    /// The point.
    pub at: f64,
    /// The range around it, or beside it.
    pub range: (f64, f64),
    /// What it is compared with.
    pub peer: Option<f64>,
}

/// The axis: whole powers of ten around all that is to be seen.
fn decades(lines: &[Line]) -> Option<(i32, i32)> {
    let values = lines.iter().flat_map(|line| [Some(line.at), Some(line.range.0), Some(line.range.1), line.peer]);
    let shown: Vec<f64> = values.flatten().filter(|v| v.is_finite() && *v > 0.0).map(f64::log10).collect();
    let low = shown.iter().copied().reduce(f64::min)?.floor() as i32;
    let high = shown.iter().copied().reduce(f64::max)?.ceil() as i32;
    Some((low, high.max(low + 1)))
}

/// The plot, or none if there is nothing to be seen. `one` draws a line at 1: what is left of it is less than the peer's.
pub fn svg(title: &str, axis: &str, lines: &[Line], one: bool) -> Option<String> {
    let (low, high) = decades(lines)?;
    let height = TOP + ROW * lines.len() as f64 + BOTTOM;
    let x = |value: f64| {
        let share = (value.log10() - f64::from(low)) / f64::from(high - low);
        LABELS + share * (WIDTH - LABELS - RIGHT)
    };
    let mut out = String::new();
    let mut put = |text: String| {
        out.push_str(&text);
        out.push('\n');
    };
    put(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">"
    ));
    put("<rect width=\"100%\" height=\"100%\" fill=\"white\"/>".to_owned());
    put(format!("<text x=\"12\" y=\"24\" font-size=\"15\">{}</text>", escaped(title)));
    let (top, bottom) = (TOP - 8.0, height - BOTTOM);
    for decade in low..=high {
        let (at, value) = (x(10_f64.powi(decade)), 10_f64.powi(decade));
        put(format!("<line x1=\"{at:.1}\" y1=\"{top}\" x2=\"{at:.1}\" y2=\"{bottom}\" stroke=\"#ddd\"/>"));
        put(format!("<text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{value}</text>", bottom + 16.0));
    }
    if one && low <= 0 && high >= 0 {
        let at = x(1.0);
        put(format!("<line x1=\"{at:.1}\" y1=\"{top}\" x2=\"{at:.1}\" y2=\"{bottom}\" stroke=\"#c33\"/>"));
    }
    let middle = f64::midpoint(LABELS, WIDTH - RIGHT);
    put(format!("<text x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">{}</text>", bottom + 34.0, escaped(axis)));
    for (n, line) in lines.iter().enumerate() {
        let y = TOP + ROW * (n as f64 + 0.5);
        let text = escaped(&line.label);
        put(format!("<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{text}</text>", LABELS - 10.0, y + 4.0));
        let shown = |value: f64| value.is_finite() && value > 0.0;
        let (from, to) = line.range;
        if shown(from) && shown(to) {
            let (from, to) = (x(from), x(to));
            put(format!(
                "<line x1=\"{from:.1}\" y1=\"{y}\" x2=\"{to:.1}\" y2=\"{y}\" stroke=\"#47a\" stroke-width=\"3\"/>"
            ));
        }
        if let Some(peer) = line.peer.filter(|peer| shown(*peer)) {
            let at = x(peer);
            put(format!(
                "<path d=\"M{:.1} {y} L{at:.1} {} L{:.1} {y} L{at:.1} {} Z\" fill=\"none\" stroke=\"#c33\" stroke-width=\"2\"/>",
                at - 5.0,
                y - 5.0,
                at + 5.0,
                y + 5.0
            ));
        }
        if shown(line.at) {
            put(format!("<circle cx=\"{:.1}\" cy=\"{y}\" r=\"4\" fill=\"#147\"/>", x(line.at)));
        }
    }
    put("</svg>".to_owned());
    Some(out)
}

/// Text within an element.
pub(crate) fn escaped(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        // Writing to a string cannot fail.
        let _ = match c {
            '&' => write!(out, "&amp;"),
            '<' => write!(out, "&lt;"),
            '>' => write!(out, "&gt;"),
            c => write!(out, "{c}"),
        };
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(at: f64, range: (f64, f64), peer: Option<f64>) -> Line {
        Line { label: "a<b".into(), at, range, peer }
    }

    #[test]
    fn the_axis_has_all_values_between_its_ends() {
        assert_eq!(decades(&[line(0.5, (0.4, 20.0), Some(150.0))]), Some((-1, 3)));
        assert_eq!(decades(&[line(1.0, (1.0, 1.0), None)]), Some((0, 1)));
        assert_eq!(decades(&[line(-3.0, (f64::NAN, 0.0), None)]), None);
    }

    #[test]
    fn a_point_lies_where_its_value_is() {
        let text = svg("t & u", "ms", &[line(10.0, (1.0, 100.0), None)], true).unwrap();
        // In the middle of two decades.
        let middle = f64::midpoint(LABELS, WIDTH - RIGHT);
        assert!(text.contains(&format!("<circle cx=\"{middle:.1}\"")), "{text}");
        assert!(text.contains("a&lt;b") && text.contains("t &amp; u") && text.ends_with("</svg>\n"), "{text}");
        assert_eq!(text.matches("<circle").count(), 1);
        // What is not above zero has no point, and nothing else is drawn for it.
        let nothing =
            svg("t", "ms", &[line(1.0, (1.0, 1.0), None), line(-1.0, (-1.0, 2.0), Some(0.0))], false).unwrap();
        assert_eq!((nothing.matches("<circle").count(), nothing.matches("<path").count()), (1, 0));
        assert_eq!(svg("t", "ms", &[line(0.0, (0.0, 0.0), None)], true), None);
    }
}
