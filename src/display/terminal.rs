//! A run on a terminal: one bar a running stage, one line for everything that is over.

use std::collections::BTreeMap;
use std::time::Duration;

use contract::Progress;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::plain::{lasting, said};
use super::size;
use crate::event::Event;

const REFRESH: Duration = Duration::from_millis(200);
/// Columns that a bar takes beside the name of its stage.
const BESIDE_NAME: usize = 64;
/// Columns before a name where there is no room for a bar.
const BEFORE_NAME: usize = 5;

pub(super) struct Terminal {
    bars: MultiProgress,
    running: BTreeMap<String, ProgressBar>,
    verbose: bool,
    /// A terminal may be resized while a stage runs.
    columns: fn() -> usize,
}

impl Terminal {
    pub(super) fn new(verbose: bool) -> Self {
        Self::on(ProgressDrawTarget::stderr(), || super::columns().unwrap_or(80), verbose)
    }

    fn on(target: ProgressDrawTarget, columns: fn() -> usize, verbose: bool) -> Self {
        let bars = MultiProgress::with_draw_target(target);
        Self { bars, running: BTreeMap::new(), verbose, columns }
    }

    pub(super) fn show(&mut self, event: &Event) {
        match event {
            Event::StageProgress { stage, progress } => self.progress(stage, progress),
            Event::StageStarted { stage, .. }
            | Event::StageFetching { stage, .. }
            | Event::StagePushing { stage, .. } => {
                self.line(lasting(event));
                let bar = self.bars.add(ProgressBar::new_spinner());
                let (name, template) = Work::Unknown.layout(stage, (self.columns)());
                bar.set_style(style(template));
                bar.set_prefix(name);
                bar.enable_steady_tick(REFRESH);
                // A stage that was not fetched after all runs.
                if let Some(earlier) = self.running.insert(stage.clone(), bar) {
                    earlier.finish_and_clear();
                }
            }
            Event::StageFinished { stage, .. }
            | Event::StageFailed { stage, .. }
            | Event::StageFetched { stage, .. }
            | Event::StageNotFound { stage, .. }
            | Event::StagePushed { stage, .. } => {
                if let Some(bar) = self.running.remove(stage) {
                    bar.finish_and_clear();
                }
                self.line(lasting(event));
            }
            Event::RunFinished { .. } | Event::PushFinished { .. } => {
                for bar in std::mem::take(&mut self.running).into_values() {
                    bar.finish_and_clear();
                }
                self.line(lasting(event));
            }
            _ => self.line(lasting(event)),
        }
    }

    fn progress(&self, stage: &str, progress: &Progress) {
        let Progress::Advance { done, total, unit, note } = progress else {
            return self.line(said(stage, progress, self.verbose));
        };
        let Some(bar) = self.running.get(stage) else { return };
        if *total > 0 {
            let work = if unit == "bytes" { Work::Bytes } else { Work::Steps };
            let (name, template) = work.layout(stage, (self.columns)());
            bar.set_length(*total);
            bar.set_style(style(template));
            bar.set_prefix(name);
            bar.set_position(*done);
            let unit = if unit == "bytes" { "" } else { unit.as_str() };
            let gap = if note.is_empty() { "" } else { " · " };
            bar.set_message(format!("{unit}{gap}{note}"));
        } else {
            let done = if unit == "bytes" { size(*done) } else { format!("{done} {unit}") };
            bar.set_message(format!("{done} {note}"));
        }
    }

    fn line(&self, line: Option<String>) {
        if let Some(line) = line {
            // Goes above the bars, and is kept when there are none.
            if self.running.is_empty() {
                super::note(&line);
            } else {
                let _ = self.bars.println(line);
            }
        }
    }
}

/// What a running stage counts.
#[derive(Clone, Copy)]
enum Work {
    Unknown,
    Steps,
    Bytes,
}

impl Work {
    /// The name of a stage as it is shown, and the template of its line, which takes one row of so
    /// many columns: a bar where there is room, else a percentage before the name.
    fn layout(self, stage: &str, columns: usize) -> (String, &'static str) {
        let roomy = stage.chars().count() + BESIDE_NAME <= columns;
        let template = match self {
            Self::Unknown => "{spinner} {elapsed:>3} {prefix} {wide_msg}",
            Self::Steps if roomy => "{prefix} {bar:24} {pos}/{len} {wide_msg} {elapsed} left {eta}",
            Self::Bytes if roomy => {
                "{prefix} {bar:24} {bytes}/{total_bytes} {bytes_per_sec} {wide_msg} left {eta}"
            }
            Self::Steps | Self::Bytes => "{percent:>3}% {prefix} {wide_msg}",
        };
        (shortened(stage, columns.saturating_sub(BEFORE_NAME + 3)), template)
    }
}

/// A name in at most `most` columns. Its end stays longest: points of a sweep differ there.
fn shortened(name: &str, most: usize) -> String {
    let chars: Vec<char> = name.chars().collect();
    if chars.len() <= most {
        return name.to_owned();
    }
    let kept = most.saturating_sub(1);
    let (start, end) = (kept / 3, kept - kept / 3);
    let part = |chars: &[char]| chars.iter().collect::<String>();
    format!("{}…{}", part(&chars[..start]), part(&chars[chars.len() - end..]))
}

/// The templates are constants of this file.
fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("━╸ ")
}

#[cfg(test)]
mod tests;
