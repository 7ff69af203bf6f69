//! Curves over time as SVG: what was true as a line, what was seen of it as points, one panel below the other.
//!
//! ```text
//!  100 ┤      ╭─●─╮          ●  collectd
//!   50 ┤ ●──╯     ╰─●        ○  prometheus-node-exporter
//!    0 ┼──────┬──────┬────   ─  the source itself
//!      0     40     80 s
//! ```

use crate::plot::escaped;

/// Sizes in pixels.
const WIDTH: f64 = 900.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 250.0;
const TOP: f64 = 44.0;
const PANEL: f64 = 220.0;
const GAP: f64 = 56.0;
/// At most so many steps on an axis.
const STEPS: f64 = 6.0;
/// Of points, in turn; of all lines.
const COLOURS: [&str; 4] = ["#c33", "#147", "#393", "#939"];
const LINE: &str = "#777";

/// How a curve is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// From point to point.
    Line,
    /// Each for itself.
    Points,
}

/// A curve.
#[derive(Clone, Debug, PartialEq)]
pub struct Curve {
    /// Its name.
    pub label: String,
    /// How it is drawn.
    pub mark: Mark,
    /// Seconds and values.
    pub points: Vec<(f64, f64)>,
}

/// Curves with a common axis, which begins at zero.
#[derive(Clone, Debug, PartialEq)]
pub struct Panel {
    /// What the values are, with their unit.
    pub axis: String,
    /// The curves.
    pub curves: Vec<Curve>,
}

/// The step of an axis that goes as far as this: 1, 2 or 5 times a power of ten.
fn step(to: f64) -> f64 {
    let power = 10_f64.powf((to / STEPS).log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|n| n * power).find(|step| to / step <= STEPS).unwrap_or(10.0 * power)
}

fn largest(values: impl Iterator<Item = f64>) -> Option<f64> {
    values.filter(|value| value.is_finite()).reduce(f64::max).filter(|value| *value > 0.0)
}

/// The plot, over seconds from zero, or none if there is nothing to be seen.
pub fn svg(title: &str, panels: &[Panel]) -> Option<String> {
    let points = |panel: &Panel| panel.curves.iter().flat_map(|curve| curve.points.clone()).collect::<Vec<_>>();
    let last = largest(panels.iter().flat_map(points).map(|(time, _)| time))?;
    let height = TOP + (PANEL + GAP) * panels.len() as f64;
    let x = |time: f64| LEFT + time / last * (WIDTH - LEFT - RIGHT);
    let mut out = vec![
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\" \
             font-family=\"sans-serif\" font-size=\"12\">"
        ),
        "<rect width=\"100%\" height=\"100%\" fill=\"white\"/>".to_owned(),
        format!("<text x=\"12\" y=\"24\" font-size=\"15\">{}</text>", escaped(title)),
    ];
    for (n, panel) in panels.iter().enumerate() {
        let (top, bottom) = (TOP + (PANEL + GAP) * n as f64, TOP + (PANEL + GAP) * n as f64 + PANEL);
        let most = largest(points(panel).into_iter().map(|(_, value)| value))?;
        let (across, up) = (step(last), step(most));
        let most = up * (most / up).ceil();
        let y = |value: f64| bottom - value / most * (PANEL - 20.0);
        let ticks = |step: f64, to: f64| (0..=(to / step).round() as u32).map(move |n| f64::from(n) * step);
        for value in ticks(up, most) {
            let at = y(value);
            out.push(format!(
                "<line x1=\"{LEFT}\" y1=\"{at:.1}\" x2=\"{:.1}\" y2=\"{at:.1}\" stroke=\"#ddd\"/>",
                x(last)
            ));
            out.push(format!("<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{value}</text>", LEFT - 8.0, at + 4.0));
        }
        for time in ticks(across, last).filter(|time| *time <= last) {
            out.push(format!(
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{time} s</text>",
                x(time),
                bottom + 18.0
            ));
        }
        out.push(format!("<text x=\"{LEFT}\" y=\"{:.1}\">{}</text>", top + 8.0, escaped(&panel.axis)));
        let mut colours = COLOURS.iter().cycle();
        for (row, curve) in panel.curves.iter().enumerate() {
            let (legend, beside) = (top + 24.0 + 20.0 * row as f64, x(last) + 24.0);
            let shown = curve.points.iter().filter(|(time, value)| time.is_finite() && value.is_finite());
            let shown = shown.map(|(time, value)| (x(*time), y(*value)));
            match curve.mark {
                Mark::Line => {
                    let path: Vec<_> = shown.map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
                    let style = format!("fill=\"none\" stroke=\"{LINE}\" stroke-width=\"2\"");
                    out.push(format!("<polyline points=\"{}\" {style}/>", path.join(" ")));
                    out.push(format!("<polyline points=\"{},{legend} {beside},{legend}\" {style}/>", beside - 16.0));
                }
                Mark::Points => {
                    let style = format!("r=\"4\" fill=\"{}\" fill-opacity=\"0.75\"", colours.next()?);
                    out.extend(shown.map(|(x, y)| format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" {style}/>")));
                    out.push(format!("<circle cx=\"{}\" cy=\"{legend}\" {style}/>", beside - 8.0));
                }
            }
            out.push(format!("<text x=\"{}\" y=\"{}\">{}</text>", beside + 8.0, legend + 4.0, escaped(&curve.label)));
        }
    }
    out.push("</svg>\n".to_owned());
    Some(out.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(mark: Mark, points: &[(f64, f64)]) -> Curve {
        Curve { label: "a<b".into(), mark, points: points.to_vec() }
    }

    #[test]
    fn axes_have_round_steps_and_few_of_them() {
        for (to, wanted) in [(100.0, 20.0), (80.0, 20.0), (60.0, 10.0), (7.0, 2.0), (0.5, 0.1), (31.0, 10.0)] {
            assert!((step(to) - wanted).abs() < 1e-9, "{to}: {}", step(to));
        }
    }

    #[test]
    fn points_and_lines_lie_where_their_values_are() {
        let seen = curve(Mark::Points, &[(50.0, 50.0), (100.0, f64::NAN)]);
        let truth = curve(Mark::Line, &[(0.0, 0.0), (100.0, 100.0)]);
        let text = svg("t & u", &[Panel { axis: "%".into(), curves: vec![seen, truth] }]).unwrap();
        let (bottom, right) = (TOP + PANEL, WIDTH - RIGHT);
        let middle = (f64::midpoint(LEFT, right), bottom - (PANEL - 20.0) / 2.0);
        assert!(text.contains(&format!("<circle cx=\"{:.1}\" cy=\"{:.1}\"", middle.0, middle.1)), "{text}");
        let line = format!("{LEFT:.1},{bottom:.1} {right:.1},{:.1}\"", bottom - (PANEL - 20.0));
        assert!(text.contains(&line), "{line} in {text}");
        // One point and one of the legend: what is no number is nowhere.
        assert_eq!(text.matches("<circle").count(), 2);
        assert!(text.contains("t &amp; u") && text.matches("a&lt;b").count() == 2 && text.ends_with("</svg>\n"));
    }

    #[test]
    fn where_nothing_is_to_be_seen_there_is_no_plot() {
        let panel = |points| Panel { axis: "%".into(), curves: vec![curve(Mark::Line, points)] };
        assert_eq!(svg("t", &[panel(&[])]), None);
        assert_eq!(svg("t", &[panel(&[(0.0, 1.0)])]), None);
        assert_eq!(svg("t", &[panel(&[(1.0, 0.0)])]), None);
    }
}
