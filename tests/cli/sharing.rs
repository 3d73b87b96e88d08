//! One cache for several users, projects and runs at the same time.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;

use crate::space::{DIAMOND, Ran, Space, ran};

/// Somebody else.
const NOBODY: u32 = 65_534;

fn below(path: &Path) -> Vec<PathBuf> {
    let (mut open, mut found) = (vec![path.to_owned()], Vec::new());
    while let Some(path) = open.pop() {
        if path.is_dir() {
            open.extend(fs::read_dir(&path).unwrap().flatten().map(|e| e.path()));
        }
        found.push(path);
    }
    found
}

/// Makes everything in the cache look unused, but for what runs that go on say.
fn age(space: &Space, hours: u64) {
    let then = SystemTime::now() - Duration::from_secs(hours * 3600);
    for path in below(&space.cache()) {
        if !path.parent().unwrap().ends_with("running") {
            fs::File::open(&path).and_then(|file| file.set_modified(then)).unwrap();
        }
    }
}

fn is_root() -> bool {
    fs::metadata("/proc/self").unwrap().uid() == 0
}

/// Makes a file unreadable for [`as_other`].
fn close(path: &Path) {
    let mode = if is_root() { 0o600 } else { 0 };
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// A command of another user where tests may have one, who can write everything that is there now;
/// else of the same, whom modes keep out likewise.
fn as_other(space: &Space, args: &[&str]) -> Command {
    let plain = space.command(args);
    if !is_root() {
        return plain;
    }
    let binary = space.outside().join("pipe");
    if !binary.exists() {
        fs::copy(env!("CARGO_BIN_EXE_pipe"), &binary).unwrap();
        for path in below(space.outside()) {
            let mode = fs::metadata(&path).unwrap().permissions().mode();
            let is_count = path.parent().unwrap().ends_with("runs");
            let open = if path.is_dir() || is_count { 0o777 } else { mode | 0o444 };
            fs::set_permissions(&path, fs::Permissions::from_mode(open)).unwrap();
        }
    }
    let mut command = Command::new(binary);
    command.args(plain.get_args()).current_dir(plain.get_current_dir().unwrap());
    for (name, value) in plain.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command.env("HOME", space.outside().join("home")).uid(NOBODY).gid(NOBODY);
    command
}

fn other(space: &Space, args: &[&str]) -> Ran {
    ran(&as_other(space, args).output().unwrap())
}

fn fingerprint(space: &Space, stage: &str) -> String {
    let why = space.pipe(&["why", stage, "--json"]).code(0).out;
    let why: Value = serde_json::from_str(&why).unwrap();
    why["fingerprint"].as_str().unwrap().to_owned()
}

fn record(space: &Space, stage: &str) -> PathBuf {
    space.cache().join("records-v1/command").join(fingerprint(space, stage) + ".json")
}

#[track_caller]
fn wait_for(what: &dyn Fn() -> bool) {
    let since = Instant::now();
    while !what() {
        assert!(since.elapsed() < Duration::from_secs(60), "it never happened");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// `last` needs what `base` made, and `slow` before it goes on until it is told to end.
const SLOW: &str = r"
params: {value: one}
stages:
  base:
    kind: command
    params: {run: 'echo ${value} > $PIPE_OUTPUT_OUT', outputs: {out: {file: base.txt}}}
  slow:
    kind: command
    pass_env: [RUNS]
    params: {run: 'echo x >> $RUNS/slow; until test -e $RUNS/go || ! test -d $RUNS; do sleep 0.05; done; echo > $PIPE_OUTPUT_OUT', outputs: {out: {file: slow.txt}}}
  last:
    kind: command
    inputs: {a: base, b: slow}
    params: {run: 'cat $PIPE_INPUT_A > $PIPE_OUTPUT_OUT', outputs: {out: {file: last.txt}}}
";

#[test]
fn gc_leaves_what_a_run_that_goes_on_has_reused_whatever_others_run_meanwhile() {
    let space = Space::new(SLOW);
    space.pipe(&["run", "base"]).code(0);
    let long = space.command(&["run", "-j", "1"]).stderr(Stdio::piped()).spawn().unwrap();
    wait_for(&|| space.runs("slow") == 1);
    space.pipe(&["run", "base", "--set", "value=two"]).code(0);
    age(&space, 3);
    let gone = space.pipe(&["cache", "gc", "--older-than", "2h"]).code(0).out;
    assert!(gone.contains("removed 0 records, 0 objects"), "{gone}");
    fs::write(space.outside().join("runs/go"), "").unwrap();
    let long = ran(&long.wait_with_output().unwrap()).code(0);
    assert!(long.err.contains("2 run, 1 reused"), "{}", long.err);
    assert_eq!(fs::read_dir(space.cache().join("running")).unwrap().count(), 0);
    // It is over: the one that the pipeline ran first is nobody's now.
    space.pipe(&["run", "base", "--set", "value=two"]).code(0);
    age(&space, 3);
    let gone = space.pipe(&["cache", "gc", "--older-than", "2h"]).code(0).out;
    assert!(gone.contains("removed 1 records"), "{gone}");
}

#[test]
fn run_that_was_killed_keeps_nothing_for_longer_than_the_grace() {
    let space = Space::new(SLOW);
    space.pipe(&["run", "base"]).code(0);
    let base = fingerprint(&space, "base");
    space.pipe(&["run", "base", "--set", "value=two"]).code(0);
    let dead = space.cache().join("running/dead");
    fs::create_dir_all(dead.parent().unwrap()).unwrap();
    fs::write(&dead, format!("{base}\n")).unwrap();
    age(&space, 3);
    let gc = ["cache", "gc", "--older-than", "2h", "--dry-run"];
    assert!(space.pipe(&gc).code(0).out.contains("would remove 0 records"));
    let then = SystemTime::now() - Duration::from_secs(2 * 3600);
    fs::File::open(&dead).and_then(|file| file.set_modified(then)).unwrap();
    assert!(space.pipe(&gc).code(0).out.contains("would remove 1 records"));
}

#[test]
fn run_that_reuses_everything_writes_nothing_of_what_it_uses() {
    let space = Space::new(DIAMOND);
    space.pipe(&["run"]).code(0);
    let before: Vec<PathBuf> = below(&space.cache());
    fs::remove_dir(space.cache().join("running")).unwrap();
    space.pipe(&["run"]).code(0);
    assert!(!space.cache().join("running").exists());
    assert_eq!(below(&space.cache()).len(), before.len() - 1);
}

#[test]
fn stages_that_were_dropped_and_projects_that_are_gone_keep_nothing_after_90_days() {
    let space = Space::new(DIAMOND);
    space.pipe(&["run"]).code(0);
    let (name, _) = DIAMOND.split_once("  last:").unwrap();
    space.write("pipeline.yaml", name);
    age(&space, 91 * 24);
    space.pipe(&["run"]).code(0);
    let gone = space.pipe(&["cache", "gc", "--older-than", "2h"]).code(0).out;
    assert!(gone.contains("removed 1 records"), "{gone}");
    space.pipe(&["plan", "--check"]).code(0);
    age(&space, 91 * 24);
    let gone = space.pipe(&["cache", "gc", "--older-than", "2h"]).code(0).out;
    assert!(gone.contains("removed 3 records"), "{gone}");
    assert!(below(&space.cache().join("roots")).len() == 1, "a forgotten project has no file");
}

#[test]
fn runs_can_be_looked_up_for_a_year() {
    let space = Space::new(DIAMOND);
    space.pipe(&["run"]).code(0);
    let runs = || space.pipe(&["runs", "ls"]).code(0).out.contains("4 ran");
    for (days, kept) in [(360, true), (366, false)] {
        age(&space, days * 24);
        space.pipe(&["cache", "gc"]).code(0);
        assert_eq!(runs(), kept, "{days}");
    }
}

#[test]
fn lease_that_may_not_be_read_is_held_while_its_heart_beats() {
    let space = Space::new(DIAMOND);
    space.pipe(&["run", "right"]).code(0);
    let lease = space.cache().join("leases").join(fingerprint(&space, "left"));
    fs::create_dir_all(lease.parent().unwrap()).unwrap();
    fs::write(&lease, "not for everybody").unwrap();
    let mut command = as_other(&space, &["run", "left", "--json"]);
    close(&lease);
    let mut run = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut events = BufReader::new(run.stdout.take().unwrap()).lines().map(Result::unwrap);
    let waiting: Value = events
        .find(|e| e.contains("stage-waiting"))
        .map(|e| serde_json::from_str(&e).unwrap())
        .unwrap();
    let holder = waiting["holder"].as_str().unwrap();
    assert!(
        holder.starts_with("another user (the lease is ") && holder.contains("mode 0"),
        "{holder}"
    );
    assert_eq!(space.runs("left"), 0);
    assert!(lease.exists());
    fs::remove_file(&lease).unwrap();
    events.for_each(drop);
    assert!(run.wait().unwrap().success());
    assert_eq!(space.runs("left"), 1);
}

#[test]
fn record_that_may_not_be_read_is_an_explained_miss_and_no_damage() {
    let space = Space::new(DIAMOND);
    space.pipe(&["run"]).code(0);
    let record = record(&space, "last");
    other(&space, &["plan", "--check"]).code(0);
    close(&record);
    let plan = other(&space, &["plan"]).code(0).out;
    assert!(plan.contains("you may not read it"), "{plan}");
    assert!(plan.contains("mode 0") && plan.contains("pipe doctor"), "{plan}");
    assert!(!plan.contains("never ran"), "{plan}");
    let repair = other(&space, &["cache", "repair"]).code(5).out;
    assert!(repair.contains("all that may be read is sound"), "{repair}");
    assert!(record.exists());
    let doctor = other(&space, &["doctor"]).out;
    assert!(doctor.contains("keeps this user out") && doctor.contains("chmod -R g+rX"), "{doctor}");
    // What it needs is not known, so that nothing may go that it could need.
    age(&space, 24 * 91);
    let gc = other(&space, &["cache", "gc", "--older-than", "1h", "--dry-run"]).code(0).out;
    assert!(gc.contains("no object can go") && gc.contains(" 0 objects"), "{gc}");
    other(&space, &["run"]).code(0);
    assert_eq!(space.runs("last"), 2);
    other(&space, &["plan", "--check"]).code(0);
}

#[test]
fn explanations_and_logs_are_those_of_the_project_and_a_clone_gets_the_newest_of_others() {
    let space = Space::new(DIAMOND);
    space.pipe(&["run"]).code(0);
    let text = fs::read_to_string(space.path("pipeline.yaml")).unwrap();
    let cache = space.cache();
    let elsewhere = |name: &str, text: &str, args: &[&str]| {
        let dir = space.outside().join(name);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("pipeline.yaml"), text).unwrap();
        let all = [args, &["--cache", cache.to_str().unwrap()]].concat();
        ran(&space.command(&all).current_dir(&dir).output().unwrap())
    };
    let theirs = text
        .replace("left: one", "left: theirs")
        .replace("echo x >> $RUNS/left", "echo hello; echo x >> $RUNS/left");
    elsewhere("theirs", &theirs, &["run"]).code(0);
    space.replace("left: one", "left: three");
    let why = space.pipe(&["why", "left"]).code(0).out;
    assert!(why.contains("echo one") && !why.contains("theirs"), "{why}");
    let log = space.pipe(&["logs", "left"]).code(0).out;
    assert!(!log.contains("hello"), "{log}");
    // One whose own record gc has removed is not explained by what others ran.
    space.replace("left: three", "left: one");
    fs::remove_file(record(&space, "left")).unwrap();
    let why = space.pipe(&["why", "left"]).code(0).out;
    assert!(why.contains("its record is no longer in the cache"), "{why}");
    assert!(!why.contains("theirs") && !why.contains("never ran"), "{why}");
    space.pipe(&["run"]).code(0);
    // A clone reuses everything, and its changes are explained.
    elsewhere("clone", &text, &["plan", "--check"]).code(0);
    let why =
        elsewhere("clone", &text.replace("left: one", "left: four"), &["why", "left"]).code(0).out;
    assert!(why.contains("echo theirs") && why.contains("echo four"), "{why}");
}

#[test]
fn explanations_of_earlier_versions_are_still_read() {
    let space = Space::new(DIAMOND);
    space.pipe(&["run"]).code(0);
    let last = space.cache().join("last/pipeline");
    let project = fs::read_dir(&last).unwrap().flatten().next().unwrap().path();
    for file in fs::read_dir(&project).unwrap().flatten() {
        fs::rename(file.path(), last.join(file.file_name())).unwrap();
    }
    fs::remove_dir(&project).unwrap();
    space.replace("left: one", "left: three");
    let why = space.pipe(&["why", "left"]).code(0).out;
    assert!(why.contains("echo one"), "{why}");
}

#[test]
fn gc_removes_no_record_while_it_may_not_read_what_is_in_use() {
    let space = Space::new(DIAMOND);
    space.pipe(&["run", "left"]).code(0);
    space.pipe(&["run", "left", "--set", "left=other"]).code(0);
    let running = space.cache().join("running/somebody");
    fs::create_dir_all(running.parent().unwrap()).unwrap();
    fs::write(&running, "").unwrap();
    let roots = fs::read_dir(space.cache().join("roots")).unwrap().next().unwrap().unwrap();
    let last = space.cache().join("last/pipeline");
    let last = below(&last).into_iter().find(|path| path.is_file()).unwrap();
    age(&space, 3);
    let gc = ["cache", "gc", "--older-than", "1h", "--dry-run"];
    let gone = other(&space, &gc).code(0).out;
    assert!(gone.contains("would remove 1 records"), "{gone}");
    for path in [running, roots.path(), last] {
        let mode = fs::metadata(&path).unwrap().permissions();
        close(&path);
        let gone = other(&space, &gc).code(0).out;
        assert!(gone.contains("would remove 0 records"), "{gone}");
        assert!(gone.contains("1 files that say what is in use"), "{}: {gone}", path.display());
        let doctor = other(&space, &["doctor"]).out;
        assert!(doctor.contains("keeps this user out"), "{doctor}");
        fs::set_permissions(&path, mode).unwrap();
    }
}

#[test]
fn gc_removes_no_object_while_it_may_not_read_a_listing() {
    let space = Space::new(
        "stages:\n  s:\n    kind: command\n    params: {run: 'echo 1 > $PIPE_OUTPUT_O/a', outputs: {o: {dir: o}}}\n",
    );
    space.pipe(&["run"]).code(0);
    age(&space, 3);
    let gc = ["cache", "gc", "--older-than", "2h", "--dry-run"];
    other(&space, &gc).code(0);
    let listing = |path: &PathBuf| fs::read(path).unwrap().starts_with(b"[{");
    close(&space.objects().into_iter().find(listing).unwrap());
    let gc = other(&space, &gc).code(0).out;
    assert!(gc.contains("no object can go") && gc.contains(" 0 objects"), "{gc}");
}
