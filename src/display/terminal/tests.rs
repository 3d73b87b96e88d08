//! Runs on terminals of several sizes, seen through a screen that wraps and scrolls as real ones do.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use indicatif::TermLike;

use super::*;
use crate::digest::Fingerprint;

/// Rows from the first that was ever written; the last `height` of them are on the screen.
#[derive(Debug)]
struct Paper {
    rows: Vec<Vec<char>>,
    row: usize,
    column: usize,
}

impl Paper {
    fn next_row(&mut self) {
        (self.row, self.column) = (self.row + 1, 0);
        if self.row == self.rows.len() {
            self.rows.push(Vec::new());
        }
    }
}

#[derive(Clone, Debug)]
struct Screen {
    width: usize,
    height: usize,
    paper: Arc<Mutex<Paper>>,
}

impl Screen {
    fn new(width: usize, height: usize) -> Self {
        let paper = Paper { rows: vec![Vec::new()], row: 0, column: 0 };
        Self { width, height, paper: Arc::new(Mutex::new(paper)) }
    }

    fn on(&self, change: impl FnOnce(&mut Paper)) {
        change(&mut self.paper.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn rows(&self) -> Vec<String> {
        let paper = self.paper.lock().unwrap_or_else(PoisonError::into_inner);
        let text = |row: &Vec<char>| row.iter().collect::<String>().trim_end().to_owned();
        paper.rows.iter().map(text).filter(|row| !row.is_empty()).collect()
    }

    fn put(&self, paper: &mut Paper, text: &str) {
        for letter in text.chars() {
            match letter {
                '\r' => paper.column = 0,
                '\n' => paper.next_row(),
                _ => {
                    if paper.column == self.width {
                        paper.next_row();
                    }
                    let row = &mut paper.rows[paper.row];
                    row.resize(row.len().max(paper.column + 1), ' ');
                    row[paper.column] = letter;
                    paper.column += 1;
                }
            }
        }
    }
}

impl TermLike for Screen {
    fn width(&self) -> u16 {
        self.width as u16
    }

    fn height(&self) -> u16 {
        self.height as u16
    }

    fn move_cursor_up(&self, n: usize) -> io::Result<()> {
        // Nobody reaches what has left the screen.
        self.on(|p| p.row = p.row.saturating_sub(n).max(p.rows.len().saturating_sub(self.height)));
        Ok(())
    }

    fn move_cursor_down(&self, n: usize) -> io::Result<()> {
        self.on(|p| p.row = (p.row + n).min(p.rows.len() - 1));
        Ok(())
    }

    fn move_cursor_right(&self, n: usize) -> io::Result<()> {
        self.on(|p| p.column = (p.column + n).min(self.width - 1));
        Ok(())
    }

    fn move_cursor_left(&self, n: usize) -> io::Result<()> {
        self.on(|p| p.column = p.column.saturating_sub(n));
        Ok(())
    }

    fn write_line(&self, text: &str) -> io::Result<()> {
        self.on(|p| self.put(p, &format!("{text}\n")));
        Ok(())
    }

    fn write_str(&self, text: &str) -> io::Result<()> {
        self.on(|p| self.put(p, text));
        Ok(())
    }

    fn clear_line(&self) -> io::Result<()> {
        self.on(|p| {
            let row = p.row;
            p.rows[row].clear();
            p.column = 0;
        });
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

fn started(stage: &str) -> Event {
    let (stage, fingerprint) = (stage.to_owned(), Fingerprint([7; 32]));
    Event::StageStarted { stage, fingerprint, reasons: vec!["forced".into()], log: "a.log".into() }
}

fn advance(stage: &str, done: u64) -> Event {
    let (unit, note) = ("steps".to_owned(), "loss 0.4".to_owned());
    let progress = Progress::Advance { done, total: 60, unit, note };
    Event::StageProgress { stage: stage.to_owned(), progress }
}

fn finished(stage: &str) -> Event {
    let (stage, fingerprint) = (stage.to_owned(), Fingerprint([7; 32]));
    let warnings = Vec::new();
    Event::StageFinished { stage, fingerprint, seconds: 1.0, unchanged: false, warnings }
}

/// Eight stages side by side, all but the first of which finish; what is on the screen after half of
/// the work, and at the end.
fn eight_stages(screen: &Screen, columns: fn() -> usize) -> (Vec<String>, Vec<String>) {
    let target = ProgressDrawTarget::term_like(Box::new(screen.clone()));
    let mut terminal = Terminal::on(target, columns, false);
    let names: Vec<String> = (0..8).map(|i| format!("train@learning_rate=0.000{i}")).collect();
    for event in names.iter().map(|n| started(n)).chain(names.iter().map(|n| advance(n, 30))) {
        terminal.show(&event);
    }
    // A lasting line is never held back, and everything is drawn with it.
    terminal.show(&Event::RemoteWarning { message: "drawn".into() });
    let half = screen.rows();
    for name in &names[1..] {
        terminal.show(&finished(name));
    }
    (half, screen.rows())
}

fn percentages(rows: &[String]) -> Vec<&String> {
    rows.iter().filter(|row| row.starts_with(" 50% ")).collect()
}

#[test]
fn small_terminal_shows_a_line_a_stage_and_keeps_what_is_over() {
    let (half, end) = eight_stages(&Screen::new(20, 5), || 20);
    let bars = percentages(&half);
    assert!((1..=5).contains(&bars.len()), "{half:#?}");
    assert!(bars[0].contains("…") && bars[0].contains("=0.0000"), "{half:#?}");
    let text = end.concat();
    for i in 1..8 {
        let line = format!("train@learning_rate=0.000{i}: done 07070707");
        assert_eq!(text.matches(&line).count(), 1, "{text}");
    }
    assert_eq!(percentages(&end).len(), 1, "{end:#?}");
}

#[test]
fn usual_terminal_shows_every_stage() {
    let (half, end) = eight_stages(&Screen::new(80, 24), || 80);
    assert_eq!(percentages(&half).len(), 8, "{half:#?}");
    assert!(percentages(&half)[0].contains("learning_rate=0.0000 steps · loss 0.4"), "{half:#?}");
    assert_eq!(end.concat().matches(": done 07070707").count(), 7, "{end:#?}");
    assert_eq!(percentages(&end).len(), 1, "{end:#?}");
}

#[test]
fn bar_takes_the_room_that_a_name_leaves() {
    let bar = |stage, columns| Work::Steps.layout(stage, columns).1.contains("{bar");
    assert!(bar("train", 80) && !bar("train", 60) && !bar("train@learning_rate=0.0001", 80));
    assert_eq!(Work::Steps.layout("train", 20).0, "train");
    assert_eq!(shortened("train@learning_rate=0.0001", 12), "tra…e=0.0001");
    for columns in 0..12 {
        assert!(shortened("train@rate=0.1", columns).chars().count() <= columns.max(1));
    }
}
