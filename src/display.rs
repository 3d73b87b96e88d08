//! Everything `pipe` says: reports, progress, tables. The only module that prints.
//!
//! Data goes to standard output, everything else to standard error.

mod plain;
mod shared;
mod table;
mod terminal;
mod trace;

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};

use miette::{Diagnostic, GraphicalReportHandler, GraphicalTheme};

pub use table::table;
pub use trace::{Trace, TraceFile};

use crate::event::Event;

/// How to show a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Bars on a terminal.
    Terminal,
    /// Lines without control codes.
    Plain,
    /// One JSON object a line on standard output.
    Json,
}

impl Mode {
    /// JSON if asked for; bars if standard error is a terminal that can show them.
    pub fn detect(json: bool) -> Self {
        let set = |name: &str| std::env::var_os(name).is_some_and(|v| !v.is_empty());
        let dumb = std::env::var_os("TERM").is_none_or(|t| t == "dumb");
        if json {
            Self::Json
        } else if io::stderr().is_terminal() && !dumb && !set("CI") {
            Self::Terminal
        } else {
            Self::Plain
        }
    }
}

/// Shows the events of one run.
pub struct RunDisplay(Inner);

enum Inner {
    Terminal(terminal::Terminal),
    Plain(plain::Plain),
    Json,
}

impl RunDisplay {
    /// A display in the given mode; `verbose` shows the stages' log lines too.
    pub fn new(mode: Mode, verbose: bool) -> Self {
        Self(match mode {
            Mode::Terminal => Inner::Terminal(terminal::Terminal::new(verbose)),
            Mode::Plain => Inner::Plain(plain::Plain::new(verbose)),
            Mode::Json => Inner::Json,
        })
    }

    /// Shows one event.
    pub fn show(&mut self, event: &Event) {
        match &mut self.0 {
            Inner::Terminal(terminal) => terminal.show(event),
            Inner::Plain(plain) => {
                if let Some(line) = plain.line(event) {
                    note(&line);
                }
            }
            Inner::Json => out(&serde_json::to_string(event).unwrap_or_default()),
        }
    }
}

/// One line (or more) of data on standard output. A closed pipe is not an error.
pub fn out(text: &str) {
    let mut stdout = io::stdout().lock();
    let _ = stdout.write_all(text.as_bytes());
    if !text.ends_with('\n') {
        let _ = stdout.write_all(b"\n");
    }
    let _ = stdout.flush();
}

/// One line (or more) for people on standard error.
pub fn note(text: &str) {
    let mut stderr = io::stderr().lock();
    let _ = writeln!(stderr, "{}", text.trim_end_matches('\n'));
}

/// Shows what is wrong, with its source where there is one.
pub fn report(diagnostic: &dyn Diagnostic) {
    note(&render(diagnostic, color(), width()));
}

/// Says what to do about a panic.
pub fn defect() {
    note(concat!(
        "this is a defect of pipe ",
        env!("CARGO_PKG_VERSION"),
        ": please report the lines above and the command; what is in the cache stays sound"
    ));
}

/// A report as text, `width` columns wide.
pub fn render(diagnostic: &dyn Diagnostic, color: bool, width: usize) -> String {
    let theme = if color { GraphicalTheme::unicode() } else { GraphicalTheme::unicode_nocolor() };
    let handler = GraphicalReportHandler::new_themed(theme).with_width(width).with_links(false);
    let mut text = String::new();
    if handler.render_report(&mut text, diagnostic).is_err() {
        text = diagnostic.to_string();
    }
    text
}

/// Whether standard error may be coloured.
pub fn color() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
        && Mode::detect(false) == Mode::Terminal
}

fn width() -> usize {
    columns().map_or(100, |columns| columns.clamp(40, 120))
}

/// Columns of the terminal that standard error is; `None` where it says none.
fn columns() -> Option<usize> {
    let size = rustix::termios::tcgetwinsize(io::stderr()).ok()?;
    (size.ws_col > 0).then_some(size.ws_col.into())
}

/// `0.4 s`, `37 s`, `6 min 12 s`, `2 h 05 min`.
pub fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    if seconds < 9.95 {
        format!("{seconds:.1} s")
    } else if whole < 60 {
        format!("{whole} s")
    } else if whole < 3600 {
        format!("{} min {:02} s", whole / 60, whole % 60)
    } else {
        format!("{} h {:02} min", whole / 3600, whole % 3600 / 60)
    }
}

/// `512 B`, `1.2 KiB`, `98.3 MiB`.
pub fn size(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return if unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

/// A count with its unit, in bytes where that is the unit.
fn amount(value: u64, unit: &str) -> String {
    if unit == "bytes" { size(value) } else { format!("{value}") }
}

/// The lines of a failed stage, shared by terminal and plain output.
fn failure(
    stage: &str,
    message: &str,
    help: Option<&str>,
    log: Option<&str>,
    tail: &[String],
) -> String {
    let mut text = format!("{stage}: failed: {message}");
    if let Some(help) = help {
        let _ = write!(text, "\n  help: {help}");
    }
    for line in tail {
        let _ = write!(text, "\n  | {line}");
    }
    if let Some(log) = log {
        let _ = write!(text, "\n  log: {log}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_sizes_read_well() {
        assert_eq!(duration(0.04), "0.0 s");
        assert_eq!(duration(59.4), "59 s");
        assert_eq!(duration(372.0), "6 min 12 s");
        assert_eq!(duration(7500.0), "2 h 05 min");
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(105_000_000), "100.1 MiB");
    }
}
