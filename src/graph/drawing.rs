//! The graph as a self-contained SVG, or an HTML page around it.
//!
//! Layered layout after Sugiyama: a stage's column is one more than that of its farthest producer;
//! within a column, stages are ordered by the mean row of their producers, so that most edges do
//! not cross.

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

/// Upper left corner of each stage's box.
type Places<'a> = BTreeMap<&'a str, (usize, usize)>;

impl StageGraph {
    /// SVG; `note` adds a line under a stage's name.
    pub fn to_svg(&self, pipeline: &Pipeline, note: impl Fn(&str) -> Option<String>) -> String {
        let columns = self.columns(pipeline);
        let tallest = columns.iter().map(Vec::len).max().unwrap_or(0);
        let mut places = Places::new();
        for (x, column) in columns.iter().enumerate() {
            // Shorter columns stand in the middle.
            let offset = (tallest - column.len()) * (HEIGHT + GAP_Y) / 2;
            for (y, name) in column.iter().enumerate() {
                let corner = (MARGIN + x * (WIDTH + GAP_X), MARGIN + offset + y * (HEIGHT + GAP_Y));
                places.insert(name, corner);
            }
        }
        let width = 2 * MARGIN + columns.len() * (WIDTH + GAP_X) - GAP_X.min(columns.len() * GAP_X);
        let height = 2 * MARGIN + tallest * (HEIGHT + GAP_Y) - GAP_Y.min(tallest * GAP_Y);
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
             <defs><marker id=\"head\" viewBox=\"0 0 8 8\" refX=\"8\" refY=\"4\" \
             markerWidth=\"8\" markerHeight=\"8\" orient=\"auto\">\
             <path d=\"M0,0 L8,4 L0,8 z\" fill=\"#7a828c\"/></marker></defs>\n"
        );
        edges(pipeline, &places, &mut out);
        for stage in &pipeline.stages {
            let Some(corner) = places.get(stage.name.as_str()) else { continue };
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

    /// Names by column and row.
    fn columns(&self, pipeline: &Pipeline) -> Vec<Vec<&str>> {
        let mut place: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
        let mut columns: Vec<Vec<&str>> = Vec::new();
        let mut depth: BTreeMap<&str, usize> = BTreeMap::new();
        for name in self.order() {
            let Some(stage) = pipeline.stage(name) else { continue };
            let own = stage.needs().filter_map(|n| depth.get(n)).max().map_or(0, |d| d + 1);
            depth.insert(name, own);
            columns.resize_with(columns.len().max(own + 1), Vec::new);
            columns[own].push(name);
        }
        for (x, column) in columns.iter_mut().enumerate() {
            let mean = |name: &&str| {
                let needs: Vec<f64> = pipeline
                    .stage(name)
                    .into_iter()
                    .flat_map(crate::pipeline::Stage::needs)
                    .filter_map(|n| place.get(n).map(|(_, y)| *y as f64))
                    .collect();
                needs.iter().sum::<f64>() / needs.len().max(1) as f64
            };
            column.sort_by(|a, b| mean(a).total_cmp(&mean(b)));
            place.extend(column.iter().enumerate().map(|(y, name)| (*name, (x, y))));
        }
        columns
    }
}

/// One curve a pair of stages, labelled with the outputs it carries.
fn edges(pipeline: &Pipeline, places: &Places<'_>, out: &mut String) {
    let mut labels: BTreeMap<(&str, &str), Vec<&str>> = BTreeMap::new();
    for (from, to, output) in labelled_edges(pipeline) {
        let outputs = labels.entry((from, to)).or_default();
        if !outputs.contains(&output) {
            outputs.push(output);
        }
    }
    for ((from, to), outputs) in labels {
        let (Some((x1, y1)), Some((x2, y2))) = (places.get(from), places.get(to)) else { continue };
        let (x1, y1, y2) = (x1 + WIDTH, y1 + HEIGHT / 2, y2 + HEIGHT / 2);
        let bend = GAP_X / 2;
        let title = escaped(&format!("{from} to {to}: {}", outputs.join(", ")));
        let _ = writeln!(
            out,
            "<path d=\"M{x1},{y1} C{},{y1} {},{y2} {x2},{y2}\" fill=\"none\" stroke=\"#7a828c\" \
             marker-end=\"url(#head)\"><title>{title}</title></path>",
            x1 + bend,
            x2 - bend
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
