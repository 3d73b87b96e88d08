//! The graph as a self-contained SVG, or an HTML page around it.
//!
//! Layered layout after Sugiyama: a stage's column is one more than that of its farthest producer;
//! within a column, stages are ordered by the mean row of their producers, so that most edges do
//! not cross. Edges over several columns run in lanes between the boxes, one lane a producer.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::{StageGraph, labelled_edges, lines};
use crate::pipeline::Pipeline;

/// Pixels: a box, the gaps between boxes, the margin, and a line of text.
const WIDTH: usize = 190;
const GAP_X: usize = 90;
const GAP_Y: usize = 24;
const MARGIN: usize = 20;
const LINE: usize = 17;
/// A box holds its name, kind and note.
const HEIGHT: usize = 3 * LINE + 14;
/// Longer lines are cut: about what fits into a box.
const LONGEST: usize = 25;

/// Height kept free between the boxes of a column for an edge that passes.
const LANE: usize = 6;

/// What stands in a column: a stage's box, or the lane of a stage whose outputs are needed in a
/// column further right.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Slot<'a> {
    stage: &'a str,
    lane: bool,
}

impl Slot<'_> {
    fn height(self) -> usize {
        if self.lane { LANE } else { HEIGHT }
    }
}

/// Columns from left to right, each from top to bottom.
type Columns<'a> = Vec<Vec<Slot<'a>>>;
/// Upper left corner of a stage's box or lane, by stage and column.
type Places<'a> = BTreeMap<(&'a str, usize), (usize, usize)>;

impl StageGraph {
    /// SVG; `note` adds a line under a stage's name.
    pub fn to_svg(&self, pipeline: &Pipeline, note: impl Fn(&str) -> Option<String>) -> String {
        let columns = self.columns(pipeline);
        let tall = |column: &Vec<Slot<'_>>| -> usize {
            column.iter().map(|slot| slot.height() + GAP_Y).sum::<usize>().saturating_sub(GAP_Y)
        };
        let tallest = columns.iter().map(tall).max().unwrap_or(0);
        let mut places = Places::new();
        for (x, column) in columns.iter().enumerate() {
            // Shorter columns stand in the middle.
            let mut y = MARGIN + (tallest - tall(column)) / 2;
            for slot in column {
                places.insert((slot.stage, x), (MARGIN + x * (WIDTH + GAP_X), y));
                y += slot.height() + GAP_Y;
            }
        }
        let width = 2 * MARGIN + columns.len() * (WIDTH + GAP_X) - GAP_X.min(columns.len() * GAP_X);
        let height = 2 * MARGIN + tallest;
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
             <defs><marker id=\"head\" viewBox=\"0 0 8 8\" refX=\"8\" refY=\"4\" \
             markerWidth=\"8\" markerHeight=\"8\" orient=\"auto\">\
             <path d=\"M0,0 L8,4 L0,8 z\" fill=\"#7a828c\"/></marker></defs>\n"
        );
        let column = columns_of_boxes(&columns);
        edges(pipeline, &places, &column, &mut out);
        for stage in &pipeline.stages {
            let at = column.get(stage.name.as_str()).map(|x| (stage.name.as_str(), *x));
            let Some(corner) = at.and_then(|at| places.get(&at)) else { continue };
            let note = note(&stage.name);
            boxed(*corner, note.as_deref(), &lines(stage, note.clone()), &mut out);
        }
        out.push_str("</svg>\n");
        out
    }

    /// An HTML page with the drawing, which needs nothing else.
    pub fn to_html(&self, pipeline: &Pipeline, note: impl Fn(&str) -> Option<String>) -> String {
        let title = escaped(&pipeline.name);
        let svg = self.to_svg(pipeline, note);
        format!(
            "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n<title>{title}</title>\n\
             <style>body {{ font-family: sans-serif; margin: 1em }} \
             div {{ overflow: auto }}</style>\n<h1>{title}</h1>\n<div>\n{svg}</div>\n</html>\n"
        )
    }

    /// What stands in each column, in order.
    fn columns<'a>(&'a self, pipeline: &'a Pipeline) -> Columns<'a> {
        let mut depth: BTreeMap<&str, usize> = BTreeMap::new();
        // The last column in which the outputs of a stage are needed.
        let mut reach: BTreeMap<&str, usize> = BTreeMap::new();
        for stage in self.order().filter_map(|name| pipeline.stage(name)) {
            let own = stage.needs().filter_map(|n| depth.get(n)).max().map_or(0, |d| d + 1);
            depth.insert(&stage.name, own);
            for need in stage.needs() {
                let far = reach.entry(need).or_default();
                *far = own.max(*far);
            }
        }
        let count = depth.values().max().map_or(0, |deepest| deepest + 1);
        let mut columns: Columns<'a> = vec![Vec::new(); count];
        for stage in self.order() {
            let own = depth.get(stage).copied().unwrap_or(0);
            columns[own].push(Slot { stage, lane: false });
            for column in
                columns.iter_mut().take(reach.get(stage).copied().unwrap_or(0)).skip(own + 1)
            {
                column.push(Slot { stage, lane: true });
            }
        }
        let mut rows: BTreeMap<&str, f64> = BTreeMap::new();
        for column in &mut columns {
            let mean = |slot: &Slot<'_>| {
                if slot.lane {
                    return rows.get(slot.stage).copied().unwrap_or(0.0);
                }
                let needs = pipeline.stage(slot.stage).into_iter();
                let needs = needs.flat_map(crate::pipeline::Stage::needs);
                let needs: Vec<f64> = needs.filter_map(|n| rows.get(n).copied()).collect();
                needs.iter().sum::<f64>() / needs.len().max(1) as f64
            };
            column.sort_by(|a, b| mean(a).total_cmp(&mean(b)));
            rows = column.iter().enumerate().map(|(y, slot)| (slot.stage, y as f64)).collect();
        }
        columns
    }
}

/// The column of each stage's box.
fn columns_of_boxes<'a>(columns: &Columns<'a>) -> BTreeMap<&'a str, usize> {
    let boxes = columns.iter().enumerate().flat_map(|(x, column)| {
        column.iter().filter(|slot| !slot.lane).map(move |slot| (slot.stage, x))
    });
    boxes.collect()
}

/// One curve a pair of stages, labelled with the outputs it carries.
fn edges(
    pipeline: &Pipeline,
    places: &Places<'_>,
    column: &BTreeMap<&str, usize>,
    out: &mut String,
) {
    let mut labels: BTreeMap<(&str, &str), Vec<&str>> = BTreeMap::new();
    for (from, to, output) in labelled_edges(pipeline) {
        let outputs = labels.entry((from, to)).or_default();
        if !outputs.contains(&output) {
            outputs.push(output);
        }
    }
    for ((from, to), outputs) in labels {
        let (Some(first), Some(last)) = (column.get(from), column.get(to)) else { continue };
        let Some((x, y)) = places.get(&(from, *first)) else { continue };
        let mut path = format!("M{},{}", x + WIDTH, y + HEIGHT / 2);
        let mut at = (x + WIDTH, y + HEIGHT / 2);
        for x in first + 1..=*last {
            let key = if x == *last { (to, x) } else { (from, x) };
            let Some((x, y)) = places.get(&key) else { continue };
            let y = y + if key.0 == to { HEIGHT } else { LANE } / 2;
            let bend = GAP_X / 2;
            let _ = write!(path, " C{},{} {},{y} {x},{y}", at.0 + bend, at.1, x - bend);
            at = (x + WIDTH, y);
            if key.0 != to {
                let _ = write!(path, " H{}", at.0);
            }
        }
        let title = escaped(&format!("{from} to {to}: {}", outputs.join(", ")));
        let _ = writeln!(
            out,
            "<path d=\"{path}\" fill=\"none\" stroke=\"#7a828c\" \
             marker-end=\"url(#head)\"><title>{title}</title></path>"
        );
    }
}

fn boxed((x, y): (usize, usize), note: Option<&str>, lines: &[String], out: &mut String) {
    let fill = match note {
        Some("cached") => "#e3f4e6",
        Some("would run") => "#fde8d7",
        Some("might run") => "#fdf6d3",
        _ => "#eef2f7",
    };
    let _ = writeln!(
        out,
        "<rect x=\"{x}\" y=\"{y}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" rx=\"6\" \
         fill=\"{fill}\" stroke=\"#4a5560\"/>"
    );
    // Centred: the first baseline is higher the more lines there are.
    let top = y + (HEIGHT - LINE * lines.len().min(3)) / 2;
    for (i, line) in lines.iter().take(3).enumerate() {
        let weight = if i == 0 { "bold" } else { "normal" };
        let _ = writeln!(
            out,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\" font-weight=\"{weight}\">{}</text>",
            x + WIDTH / 2,
            top + LINE * i + LINE - 4,
            escaped(&cut(line))
        );
    }
}

fn cut(line: &str) -> String {
    if line.chars().count() <= LONGEST {
        return line.to_owned();
    }
    let short: String = line.chars().take(LONGEST - 1).collect();
    format!("{short}…")
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
