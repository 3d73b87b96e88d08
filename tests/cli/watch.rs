//! `pipe watch`: runs again when something changes, survives a broken file, stops when told to.

use std::fs::{self, File};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::space::Space;

const PIPELINE: &str = r"
stages:
  copy:
    kind: command
    inputs: {data: {path: data}}
    params: {run: 'cat $PIPE_INPUT_DATA/* > $PIPE_OUTPUT_O', outputs: {o: {file: o}}}
";

/// Ends the process if a test fails before it does.
struct Watch(Child);

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits until the watcher has said something so many times.
fn said(space: &Space, what: &str, times: usize) {
    let started = Instant::now();
    loop {
        let log = fs::read_to_string(space.path("watch.log")).unwrap();
        if log.matches(what).count() >= times {
            return;
        }
        assert!(started.elapsed() < Duration::from_secs(60), "no {times} x `{what}` in:\n{log}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn changes_are_named_and_run_and_a_broken_file_is_waited_out() {
    let space = Space::new(PIPELINE);
    space.write("data/a.txt", "one");
    let log = File::create(space.path("watch.log")).unwrap();
    let child = space.command(&["watch"]).stderr(log).stdout(Stdio::null()).spawn().unwrap();
    let mut watch = Watch(child);
    said(&space, "waiting for changes", 1);
    space.write("data/b.txt", "two");
    said(&space, "changed: data/b.txt", 1);
    said(&space, "waiting for changes", 2);
    space.pipe(&["outputs", "copy", "--to", "out"]).code(0);
    assert_eq!(fs::read_to_string(space.path("out/o")).unwrap(), "onetwo");
    space.write("pipeline.yaml", "stages: [");
    said(&space, "changed: pipeline.yaml", 1);
    said(&space, "waiting for changes", 3);
    space.write("pipeline.yaml", PIPELINE);
    said(&space, "changed: pipeline.yaml", 2);
    said(&space, "waiting for changes", 4);
    let process = watch.0.id().to_string();
    assert!(Command::new("kill").args(["-INT", &process]).status().unwrap().success());
    assert_eq!(watch.0.wait().unwrap().code(), Some(130));
}
