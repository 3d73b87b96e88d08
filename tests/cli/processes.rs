//! Processes that are killed, interrupted, or at the same work.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use crate::space::{DIAMOND, Space};

/// One quick stage, and one that a marker process keeps running.
fn endless(marker: &str) -> Space {
    Space::new(&format!(
        "stages:\n  quick:\n    kind: command\n    pass_env: [RUNS]\n    params: {{run: 'echo x >> $RUNS/quick; echo 1 > $PIPE_OUTPUT_O', outputs: {{o: {{file: o}}}}}}\n  \
         slow:\n    kind: command\n    pass_env: [RUNS]\n    inputs: {{q: quick}}\n    params: {{run: 'echo x >> $RUNS/slow; if [ ! -e $RUNS/go ]; then sleep {marker} & wait; fi; echo 1 > $PIPE_OUTPUT_O', outputs: {{o: {{file: o}}}}}}\n"
    ))
}

/// Processes whose command line holds `sleep MARKER`.
fn sleepers(marker: &str) -> usize {
    let mut found = 0;
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        found += usize::from(line.starts_with(&format!("sleep {marker}")));
    }
    found
}

/// Polls until `test` holds.
#[track_caller]
fn eventually(what: &str, test: impl Fn() -> bool) {
    for _ in 0..600 {
        if test() {
            return;
        }
        sleep(Duration::from_millis(50));
    }
    panic!("never: {what}");
}

fn start(space: &Space, marker: &str) -> Child {
    let child =
        space.command(&["run"]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    eventually("the slow stage starts", || sleepers(marker) == 1);
    child
}

fn signal(name: &str, process: u32) {
    let status = Command::new("kill").arg(name).arg(process.to_string()).status().unwrap();
    assert!(status.success());
}

#[test]
fn killed_parent_leaves_no_child_and_the_next_run_goes_on() {
    let marker = "86401.1";
    let space = endless(marker);
    let mut parent = start(&space, marker);
    parent.kill().unwrap();
    parent.wait().unwrap();
    eventually("every child is gone", || sleepers(marker) == 0);
    fs::write(space.outside().join("runs/go"), "").unwrap();
    let run = space.pipe(&["run"]).code(0);
    assert!(run.err.contains("1 run, 1 reused"), "{}", run.err);
    assert_eq!((space.runs("quick"), space.runs("slow")), (1, 2));
}

#[test]
fn killed_stage_process_is_named_and_leaves_no_child() {
    let marker = "86402.2";
    let space = endless(marker);
    let mut parent = start(&space, marker);
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", parent.id()));
    let stages: Vec<u32> = match children {
        Ok(text) if !text.trim().is_empty() => {
            text.split_whitespace().map(|p| p.parse().unwrap()).collect()
        }
        _ => stage_processes(parent.id()),
    };
    for stage in stages {
        signal("-KILL", stage);
    }
    assert_eq!(parent.wait().unwrap().code(), Some(4));
    eventually("every child is gone", || sleepers(marker) == 0);
}

/// Children of a process, whichever of its threads started them.
fn stage_processes(parent: u32) -> Vec<u32> {
    let parent_of = |process: u32| -> Option<u32> {
        let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
        stat.rsplit(')').next()?.split_whitespace().nth(1)?.parse().ok()
    };
    fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .filter(|p| parent_of(*p) == Some(parent))
        .collect()
}

#[test]
fn interrupt_stops_everything_with_exit_code_130() {
    let marker = "86403.3";
    let space = endless(marker);
    let mut parent = start(&space, marker);
    signal("-INT", parent.id());
    assert_eq!(parent.wait().unwrap().code(), Some(130));
    eventually("every child is gone", || sleepers(marker) == 0);
    assert!(fs::read_dir(space.cache().join("leases")).unwrap().next().is_none());
}

#[test]
fn two_processes_execute_a_fingerprint_once() {
    let space = Space::new(DIAMOND);
    space.replace("echo x >> $RUNS/left;", "echo x >> $RUNS/left; sleep 1;");
    let spawn = || space.command(&["run"]).stderr(Stdio::piped()).spawn().unwrap();
    let runs = [spawn(), spawn(), spawn()];
    for run in runs {
        assert!(run.wait_with_output().unwrap().status.success());
    }
    assert_eq!(space.all_runs(), [1, 1, 1, 1]);
}
