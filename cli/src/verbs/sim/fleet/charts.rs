//! The charts of the report, as SVG that a page's style can colour anew.
//!
//! A chart is drawn at twice the size of its card, so that whole pixels are fine enough. Names and values
//! stand beside what they belong to; there is no legend over the data. Each colour below is a value that
//! the page's style maps for dark screens.

use std::fmt::Write as _;

use forebay_sim::fleet::{Grid, Grids, Point};
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::{
    BindKeyPoints as _, Cartesian2d, ChartBuilder, ChartContext, Circle, Color as _,
    DashedLineSeries, DrawingArea, DrawingAreaErrorKind, IntoDrawingArea as _, IntoFont as _,
    IntoLogRange as _, LineSeries, PathElement, RGBColor, Rectangle, SVGBackend, ShapeStyle, Text,
};
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontStyle, TextStyle};

/// How a contender looks in every chart.
#[derive(Clone, Debug)]
pub(super) struct Look {
    pub(super) label: String,
    /// Its place in [`PALETTE`].
    pub(super) colour: usize,
    /// Somebody before it has its colour.
    pub(super) dashed: bool,
    /// The width of its lines.
    pub(super) width: u32,
}

/// Okabe and Ito's colours, told apart by the colour-blind, without their yellow, which white swallows.
pub(super) const PALETTE: [RGBColor; 7] = [
    RGBColor(0x00, 0x72, 0xB2),
    RGBColor(0xD5, 0x5E, 0x00),
    RGBColor(0x00, 0x9E, 0x73),
    RGBColor(0xCC, 0x79, 0xA7),
    RGBColor(0xE6, 0x9F, 0x00),
    RGBColor(0x56, 0xB4, 0xE9),
    RGBColor(0x33, 0x33, 0x33),
];
const INK: RGBColor = RGBColor(0x1B, 0x1F, 0x24);
const MUTED: RGBColor = RGBColor(0x5B, 0x64, 0x70);
const GRID: RGBColor = RGBColor(0xDD, 0xE1, 0xE6);
const BAND: RGBColor = RGBColor(0xEC, 0xEF, 0xF2);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), DrawingAreaErrorKind<std::io::Error>>;
type Chart<'a, 'b, X> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<X, RangedCoordf64>>;

const WIDTH: u32 = 1_200;
const HEIGHT: u32 = 760;
const FONT: f64 = 34.0;
const LINE: i32 = 42;

/// Goodput over offered load, one curve a contender; `kept` is where it keeps 90 and 99 %.
pub(super) fn goodput(
    looks: &[Look],
    curves: &[Vec<Point>],
    kept: &[[Option<(f64, f64)>; 2]],
    bound: f64,
    common: f64,
) -> String {
    let alt = "Goodput over offered load, one curve for each policy";
    draw(HEIGHT, alt, |root| {
        let points = || curves.iter().flatten();
        let most = points().map(|point| point.rate).fold(0.0, f64::max);
        let high = points().map(|point| 1.02 * point.goodput);
        let high = high.fold(1.1 * bound, f64::max);
        let mut chart = ChartBuilder::on(root)
            .margin_top(10)
            .margin_right(room(looks) + 60)
            .x_label_area_size(100)
            .y_label_area_size(120)
            .build_cartesian_2d(0.0..most, 0.0..high)?;
        chart
            .configure_mesh()
            .light_line_style(GRID.mix(0.0))
            .bold_line_style(GRID)
            .axis_style(MUTED)
            .x_labels(8)
            .y_labels(6)
            .x_label_formatter(&|rate| tick(*rate))
            .y_label_formatter(&|rate| tick(*rate))
            .label_style(style(FONT, &MUTED))
            .axis_desc_style(style(FONT, &INK))
            .x_desc("offered load (requests/s)")
            .y_desc("goodput (requests/s)")
            .draw()?;
        let thin = MUTED.stroke_width(2);
        chart.draw_series(dashed([(0.0, bound), (most, bound)], 14, thin))?;
        chart.draw_series(dashed([(common, 0.0), (common, bound)], 4, thin))?;
        for (share, side) in [(0.9, HPos::Left), (0.99, HPos::Right)] {
            let end = (bound / share, bound);
            chart.draw_series(LineSeries::new([(0.0, 0.0), end], MUTED.stroke_width(1)))?;
            let label = format!("{:.0} %", share * 100.0);
            let place = lift(at(&chart, end), -8);
            say(root, &label, place, (side, VPos::Bottom), &MUTED)?;
        }
        let label = format!("fluid bound {}", short(bound));
        let place = lift(at(&chart, (0.0, bound)), -8);
        say(
            root,
            &label,
            (place.0 + 14, place.1),
            (HPos::Left, VPos::Bottom),
            &MUTED,
        )?;
        // The first contender last, so that it lies on top.
        for (look, curve) in looks.iter().zip(curves).rev() {
            let points: Vec<(f64, f64)> = curve.iter().map(|one| (one.rate, one.goodput)).collect();
            line(&mut chart, look, points)?;
        }
        for (look, kept) in looks.iter().zip(kept).rev() {
            let dot = |place| Circle::new(place, 9, PALETTE[look.colour].filled());
            chart.draw_series(kept.iter().flatten().copied().map(dot))?;
        }
        let ends = curves
            .iter()
            .map(|curve| curve.last().map_or((most, 0.0), |p| (p.rate, p.goodput)));
        let ends: Vec<(i32, i32)> = ends.map(|end| at(&chart, end)).collect();
        beside(root, looks, &ends, 10, pixels(HEIGHT) - 110)
    })
}

/// Which share of all requests had its first token by when; the targets are those of short, median and
/// long prompts.
pub(super) fn ttft(looks: &[Look], ttft: &[Vec<(f64, f64)>], target_ms: [f64; 3]) -> String {
    let alt = "Distribution of the time to first token, one curve for each policy";
    draw(HEIGHT, alt, |root| {
        let times = || {
            ttft.iter()
                .flatten()
                .map(|(ms, _)| *ms)
                .filter(|ms| *ms > 0.0)
        };
        let power = |ms: f64, round: fn(f64) -> f64| 10_f64.powf(round(ms.max(0.1).log10()));
        let least = power(times().fold(target_ms[0], f64::min), f64::floor);
        let most = power(times().fold(target_ms[2], f64::max) * 1.001, f64::ceil);
        let decades: Vec<f64> = std::iter::successors(Some(least), |ms| Some(ms * 10.0))
            .take_while(|ms| *ms <= most * 1.001)
            .collect();
        let mut chart = ChartBuilder::on(root)
            .margin_top(50)
            .margin_right(90)
            .x_label_area_size(100)
            .y_label_area_size(170)
            .build_cartesian_2d((least..most).log_scale().with_key_points(decades), 0.0..1.0)?;
        let band = Rectangle::new([(target_ms[0], 0.0), (target_ms[2], 1.0)], BAND.filled());
        chart.draw_series([band])?;
        chart
            .configure_mesh()
            .light_line_style(GRID.mix(0.0))
            .bold_line_style(GRID)
            .axis_style(MUTED)
            .y_labels(6)
            .x_label_formatter(&|ms| duration(*ms))
            // At the origin the other axis has its label.
            .y_label_formatter(&|share| match share * 100.0 {
                percent if percent < 1.0 => String::new(),
                percent => format!("{percent:.0} %"),
            })
            .label_style(style(FONT, &MUTED))
            .axis_desc_style(style(FONT, &INK))
            .x_desc("time to first token (log scale)")
            .y_desc("share of requests")
            .draw()?;
        let median = target_ms[1];
        let thin = MUTED.stroke_width(2);
        chart.draw_series(dashed([(median, 0.0), (median, 1.0)], 14, thin))?;
        for share in [0.5, 0.99] {
            chart.draw_series(dashed([(least, share), (most, share)], 4, thin))?;
        }
        let place = lift(at(&chart, (median, 1.0)), -6);
        let label = format!("target {}", duration(median));
        say(root, &label, place, (HPos::Center, VPos::Bottom), &MUTED)?;
        for (look, curve) in looks.iter().zip(ttft).rev() {
            let seen = curve.iter().filter(|(ms, _)| *ms > 0.0);
            let points: Vec<(f64, f64)> = seen.copied().collect();
            for share in [0.5, 0.99] {
                let first = points.iter().find(|(_, had)| *had >= share - 1e-9).copied();
                let dot = |place| Circle::new(place, 9, PALETTE[look.colour].filled());
                chart.draw_series(first.map(dot))?;
            }
            line(&mut chart, look, points)?;
        }
        Ok(())
    })
}

/// A bar a contender from `from` on, its value beside it, and perhaps a line that none can exceed.
pub(super) struct Bars<'a> {
    pub(super) alt: &'a str,
    pub(super) from: f64,
    /// The axis is at least this long.
    pub(super) to: f64,
    pub(super) ceiling: Option<(f64, String)>,
    pub(super) axis: &'a str,
    pub(super) write: fn(f64) -> String,
}

impl Bars<'_> {
    pub(super) fn draw(&self, looks: &[Look], values: &[f64]) -> String {
        let rows = i32::try_from(looks.len()).expect("few contend");
        let height = 170 + rows * 64;
        draw(height.unsigned_abs(), self.alt, |root| {
            let most = values.iter().copied().fold(self.to, f64::max);
            let to = most + (most - self.from) * 0.02;
            let mut chart = ChartBuilder::on(root)
                .margin_top(60)
                .margin_right(180)
                .x_label_area_size(100)
                .y_label_area_size(room(looks) + 30)
                .build_cartesian_2d(self.from..to, f64::from(rows)..0.0)?;
            chart
                .configure_mesh()
                .disable_y_mesh()
                .disable_y_axis()
                .light_line_style(GRID.mix(0.0))
                .bold_line_style(GRID)
                .axis_style(MUTED)
                .x_labels(6)
                .x_label_formatter(&|value| (self.write)(*value))
                .label_style(style(FONT, &MUTED))
                .axis_desc_style(style(FONT, &INK))
                .x_desc(self.axis)
                .draw()?;
            for ((row, look), value) in (0..rows).zip(looks).zip(values) {
                let (top, middle) = (f64::from(row), f64::from(row) + 0.5);
                let colour = &PALETTE[look.colour];
                let corners = [(self.from, top + 0.2), (*value, top + 0.8)];
                let fill = if look.dashed {
                    colour.mix(0.5)
                } else {
                    colour.mix(1.0)
                };
                chart.draw_series([Rectangle::new(corners, fill.filled())])?;
                let start = at(&chart, (self.from, middle));
                let left = (start.0 - 14, start.1);
                say(root, &look.label, left, (HPos::Right, VPos::Center), &INK)?;
                let value = (self.write)(*value);
                let right = (pixels(WIDTH) - 30, start.1);
                say(root, &value, right, (HPos::Right, VPos::Center), &INK)?;
            }
            if let Some((value, label)) = &self.ceiling {
                let ends = [(*value, 0.0), (*value, f64::from(rows))];
                chart.draw_series(dashed(ends, 14, INK.stroke_width(3)))?;
                let place = lift(at(&chart, ends[0]), -6);
                let side = if *value > (self.from + to) / 2.0 {
                    HPos::Right
                } else {
                    HPos::Left
                };
                say(root, label, place, (side, VPos::Bottom), &INK)?;
            }
            Ok(())
        })
    }
}

/// Attainment by balancers and staleness; colours run from `least` to 1.
pub(super) fn heat(label: &str, grids: &Grids, grid: &Grid, least: f64) -> String {
    const LEFT: i32 = 210;
    const TOP: i32 = 60;
    const CELL: (i32, i32) = (194, 104);
    let (rows, columns) = (grids.balancers.len(), grids.staleness_ms.len());
    let index = |place: usize| i32::try_from(place).expect("a grid is small");
    let bottom = TOP + index(rows) * CELL.1;
    let alt = format!("{label}: share of requests within both targets, by balancers and staleness");
    draw((bottom + 110).unsigned_abs(), &alt, |root| {
        let middle = LEFT + index(columns) * CELL.0 / 2;
        say(
            root,
            label,
            (middle, TOP - 20),
            (HPos::Center, VPos::Bottom),
            &INK,
        )?;
        for row in 0..rows {
            let top = TOP + index(row) * CELL.1;
            let name = match grids.balancers[row] {
                1 => "1 balancer".to_owned(),
                several => several.to_string(),
            };
            let place = (LEFT - 14, top + CELL.1 / 2);
            say(root, &name, place, (HPos::Right, VPos::Center), &MUTED)?;
            for column in 0..columns {
                let left = LEFT + index(column) * CELL.0;
                let share = grid.attainment[row][column];
                let (fill, text) = shade((share - least) / (1.0 - least).max(1e-9));
                let corners = [(left + 2, top + 2), (left + CELL.0 - 2, top + CELL.1 - 2)];
                root.draw(&Rectangle::new(corners, fill.filled()))?;
                let place = (left + CELL.0 / 2, top + CELL.1 / 2);
                let written = format!("{:.1}", share * 100.0);
                say(root, &written, place, (HPos::Center, VPos::Center), &text)?;
            }
        }
        for (column, ms) in grids.staleness_ms.iter().enumerate() {
            let name = if *ms == 0 {
                "fresh".to_owned()
            } else {
                duration(*ms as f64)
            };
            let place = (LEFT + index(column) * CELL.0 + CELL.0 / 2, bottom + 8);
            say(root, &name, place, (HPos::Center, VPos::Top), &MUTED)?;
        }
        let axis = "reports to each balancer every";
        say(
            root,
            axis,
            (middle, bottom + 56),
            (HPos::Center, VPos::Top),
            &INK,
        )
    })
}

/// A number of three digits or so.
pub(super) fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// A round number without the zeros after its point.
fn tick(value: f64) -> String {
    let text = format!("{value:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Milliseconds in the unit that suits them.
pub(super) fn duration(ms: f64) -> String {
    match ms {
        ms if ms < 1.0 && ms > 0.0 => format!("{ms:.1} ms"),
        ms if ms < 999.5 => format!("{ms:.0} ms"),
        ms if ms < 9_995.0 => {
            let seconds = format!("{:.2}", ms / 1e3);
            format!("{} s", seconds.trim_end_matches('0').trim_end_matches('.'))
        }
        ms => format!("{:.0} s", ms / 1e3),
    }
}

fn draw(height: u32, alt: &str, draw: impl FnOnce(&Area<'_>) -> Drawn) -> String {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        draw(&root)
            .and_then(|()| root.present())
            .expect("a string takes all that is drawn");
    }
    let mut named = String::from("<svg role=\"img\" aria-label=\"");
    let _ = write!(named, "{}\"", super::page::escaped(alt));
    svg.replacen("<svg", &named, 1)
}

fn line<X>(chart: &mut Chart<'_, '_, X>, look: &Look, points: Vec<(f64, f64)>) -> Drawn
where
    X: plotters::coord::ranged1d::Ranged<ValueType = f64>,
{
    let style = PALETTE[look.colour].stroke_width(look.width);
    if look.dashed {
        chart.draw_series(DashedLineSeries::new(points, 16, 10, style))?;
    } else {
        chart.draw_series(LineSeries::new(points, style))?;
    }
    Ok(())
}

fn dashed(
    ends: [(f64, f64); 2],
    dash: u32,
    style: ShapeStyle,
) -> DashedLineSeries<std::array::IntoIter<(f64, f64), 2>, u32> {
    DashedLineSeries::new(ends, dash, dash, style)
}

/// Where a point of a chart is.
fn at<X>(chart: &Chart<'_, '_, X>, point: (f64, f64)) -> (i32, i32)
where
    X: plotters::coord::ranged1d::Ranged<ValueType = f64>,
{
    chart.plotting_area().map_coordinate(&point)
}

/// Pixels that the longest label takes.
fn room(looks: &[Look]) -> u32 {
    let longest = looks.iter().map(|look| look.label.chars().count()).max();
    19 * u32::try_from(longest.unwrap_or(0)).expect("names are short")
}

const fn pixels(size: u32) -> i32 {
    size.cast_signed()
}

const fn lift(place: (i32, i32), by: i32) -> (i32, i32) {
    (place.0, place.1 + by)
}

/// Each contender's name to the right of where its curve ends, moved so that none covers another.
fn beside(root: &Area<'_>, looks: &[Look], ends: &[(i32, i32)], top: i32, bottom: i32) -> Drawn {
    let heights = apart(
        &ends.iter().map(|end| end.1).collect::<Vec<_>>(),
        top + LINE / 2,
        bottom,
    );
    for ((look, end), height) in looks.iter().zip(ends).zip(heights) {
        let colour = PALETTE[look.colour];
        let label = (end.0 + 44, height);
        let lead = vec![
            (end.0 + 4, end.1),
            (end.0 + 20, height),
            (end.0 + 38, height),
        ];
        root.draw(&PathElement::new(lead, colour.stroke_width(3)))?;
        say(root, &look.label, label, (HPos::Left, VPos::Center), &INK)?;
    }
    Ok(())
}

/// The same heights, at least a line from each other and, as far as there is room, inside.
fn apart(heights: &[i32], top: i32, bottom: i32) -> Vec<i32> {
    let mut order: Vec<usize> = (0..heights.len()).collect();
    order.sort_by_key(|place| heights[*place]);
    let mut moved = heights.to_vec();
    let mut free = top;
    for place in &order {
        moved[*place] = moved[*place].max(free);
        free = moved[*place] + LINE;
    }
    let mut free = bottom;
    for place in order.iter().rev() {
        moved[*place] = moved[*place].min(free);
        free = moved[*place] - LINE;
    }
    moved
}

fn say(
    root: &Area<'_>,
    text: &str,
    place: (i32, i32),
    (across, down): (HPos, VPos),
    colour: &RGBColor,
) -> Drawn {
    let style = style(FONT, colour).pos(Pos::new(across, down));
    root.draw(&Text::new(text.to_owned(), place, style))
}

fn style(size: f64, colour: &RGBColor) -> TextStyle<'_> {
    // What the backend writes is the size over 1.24.
    let font = ("sans-serif", size * 1.24)
        .into_font()
        .style(FontStyle::Normal);
    TextStyle::from(font).color(colour)
}

/// Cividis at a share of its length, and what can be read on it.
fn shade(share: f64) -> (RGBColor, RGBColor) {
    const STOPS: [(f64, f64, f64); 6] = [
        (0.0, 32.0, 77.0),
        (49.0, 68.0, 107.0),
        (102.0, 105.0, 112.0),
        (149.0, 143.0, 120.0),
        (203.0, 186.0, 105.0),
        (255.0, 234.0, 70.0),
    ];
    let along = share.clamp(0.0, 1.0) * (STOPS.len() - 1) as f64;
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // an index
    let stop = (along as usize).min(STOPS.len() - 2);
    let (from, to, part) = (STOPS[stop], STOPS[stop + 1], along - stop as f64);
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // from 0 to 255
    let mix = |from: f64, to: f64| (from + (to - from) * part).round() as u8;
    let fill = RGBColor(mix(from.0, to.0), mix(from.1, to.1), mix(from.2, to.2));
    let dark = share < 0.5;
    (
        fill,
        if dark {
            RGBColor(0xFF, 0xFF, 0xFF)
        } else {
            RGBColor(0, 0, 0)
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_keep_a_line_between_them_and_stay_inside() {
        assert_eq!(apart(&[100, 300], 0, 600), [100, 300]);
        assert_eq!(apart(&[300, 100, 101], 0, 600), [300, 100, 142]);
        assert_eq!(
            apart(&[600, 600], 0, 600),
            [558, 600],
            "the first of equals is above"
        );
        assert_eq!(apart(&[-50], 0, 600), [0]);
    }

    #[test]
    fn numbers_have_few_digits_and_their_unit() {
        let written = [0.5, 640.2, 999.9, 1_250.0, 9_990.0, 12_345.0].map(duration);
        assert_eq!(
            written,
            ["0.5 ms", "640 ms", "1 s", "1.25 s", "9.99 s", "12 s"]
        );
        assert_eq!([0.0, 2.5, 10.0, 0.25].map(tick), ["0", "2.5", "10", "0.25"]);
        assert_eq!(
            [0.123, 4.0, 45.67, 456.7].map(short),
            ["0.12", "4.00", "45.7", "457"]
        );
    }
}
