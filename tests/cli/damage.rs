//! Damage of every object and record in turn, and the layers of file systems that lose or lie.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::space::Space;

/// Files, a folder with folders in it and a program, two outputs, and a stage that never makes the same.
const MIXED: &str = r"
stages:
  file:
    kind: command
    params: {run: 'seq 2000 > $PIPE_OUTPUT_OUT', outputs: {out: {file: out}}}
  folder:
    kind: command
    inputs: {a: file}
    params: {run: 'cd $PIPE_OUTPUT_OUT; mkdir -p a/b; echo 1 > a/b/1; : > empty; cp $PIPE_INPUT_A same; cp a/b/1 x; chmod +x x', outputs: {out: {dir: out}}}
  never:
    kind: command
    inputs: {a: folder}
    params: {run: 'head -c 30 /dev/urandom | od -x > $PIPE_OUTPUT_OUT; echo more > $PIPE_OUTPUT_MORE', nondeterministic: true, outputs: {out: {file: out}, more: {file: more}}}
  last:
    kind: command
    inputs: {a: never.out, b: folder}
    params: {run: 'cat $PIPE_INPUT_A $PIPE_INPUT_B/a/b/1 > $PIPE_OUTPUT_OUT', outputs: {out: {file: out}}}
";

fn files(dir: &Path, depth: usize) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(dir).unwrap().flatten().map(|e| e.path()).collect();
    if depth > 1 {
        found = found.iter().flat_map(|dir| files(dir, depth - 1)).collect();
    }
    found.sort();
    found
}

/// Whether the pipeline as it is now uses a file of the cache: a record by its fingerprint, an object by its digest.
fn is_used(space: &Space, file: &Path) -> bool {
    let name = |path: &Path| path.file_name().unwrap().to_string_lossy().into_owned();
    let plan = space.pipe(&["plan", "--json"]).code(0).out;
    let mut text = plan;
    for object in files(&space.cache().join("objects-v1"), 2) {
        let listing = fs::read_to_string(&object).unwrap_or_default();
        if text.contains(&name(&object)) && listing.starts_with("[{") {
            text.push_str(&listing);
        }
    }
    text.contains(name(file).trim_end_matches(".json"))
}

/// Writes over a file in place, as a failing disk does, or removes it.
fn spoil(path: &Path, content: Option<&[u8]>) {
    let Some(content) = content else { return fs::remove_file(path).unwrap() };
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
    let mut file = fs::File::options().write(true).truncate(true).open(path).unwrap();
    file.write_all(content).unwrap();
}

/// A flipped bit in the middle, a cut in the middle, emptied, lengthened, removed.
fn ways(whole: &[u8]) -> Vec<Option<Vec<u8>>> {
    let mut flipped = whole.to_vec();
    let middle = whole.len() / 2;
    let mut ways = vec![Some([whole, b"!"].concat()), None];
    if !whole.is_empty() {
        flipped[middle] ^= 16;
        ways.extend([Some(flipped), Some(whole[..middle].to_vec()), Some(Vec::new())]);
    }
    ways
}

/// Damages every file of a folder of the cache in every way; each time a run makes it anew.
fn damage_all(folder: &str) -> Space {
    let space = Space::new(MIXED);
    space.pipe(&["run"]).code(0);
    for file in files(&space.cache().join(folder), 2) {
        let whole = fs::read(&file).unwrap();
        for way in ways(&whole) {
            // What is never the same was made anew, and is another now.
            if !is_used(&space, &file) {
                break;
            }
            spoil(&file, way.as_deref());
            space.pipe(&["plan", "--check"]).code(6);
            space.pipe(&["run"]).code(0);
            space.pipe(&["plan", "--check"]).code(0);
        }
    }
    assert!(space.pipe(&["cache", "verify"]).code(0).out.contains("all sound"));
    space
}

#[test]
fn every_damaged_object_is_noticed_and_made_anew_in_the_same_run() {
    let space = damage_all("objects-v1");
    space.pipe(&["outputs", "folder", "--to", "kept"]).code(0);
    assert_eq!(fs::read_to_string(space.path("kept/out/a/b/1")).unwrap(), "1\n");
    assert_ne!(fs::metadata(space.path("kept/out/x")).unwrap().permissions().mode() & 0o111, 0);
}

#[test]
fn damage_that_keeps_size_and_time_is_found_by_verify() {
    let space = Space::new(MIXED);
    space.pipe(&["run"]).code(0);
    for object in files(&space.cache().join("objects-v1"), 2) {
        let mut content = fs::read(&object).unwrap();
        if content.is_empty() || !is_used(&space, &object) {
            continue;
        }
        let time = fs::metadata(&object).unwrap().modified().unwrap();
        let middle = content.len() / 2;
        content[middle] ^= 16;
        spoil(&object, Some(&content));
        fs::File::options().write(true).open(&object).unwrap().set_modified(time).unwrap();
        let found = space.pipe(&["cache", "verify"]).code(5).out;
        assert!(found.contains("holds other bytes than its digest says"), "{found}");
        space.pipe(&["cache", "repair"]).code(0);
        space.pipe(&["plan", "--check"]).code(6);
        space.pipe(&["run"]).code(0);
        assert!(space.pipe(&["cache", "verify"]).code(0).out.contains("all sound"));
    }
}

#[test]
fn every_damaged_record_is_noticed_and_made_anew_in_the_same_run() {
    damage_all("records-v1");
}

#[test]
fn lost_object_of_what_is_never_the_same_does_not_block_publishing() {
    let space = Space::new(MIXED);
    space.pipe(&["run"]).code(0);
    let made = |to: &str| {
        space.pipe(&["outputs", "never", "--to", to]).code(0);
        fs::read(space.path(to).join("out")).unwrap()
    };
    let first = made("one");
    let object = files(&space.cache().join("objects-v1"), 2);
    fs::remove_file(object.iter().find(|o| fs::read(o).unwrap() == first).unwrap()).unwrap();
    let run = space.pipe(&["run"]).code(0).err;
    assert!(run.contains("2 run, 2 reused"), "{run}");
    assert_ne!(made("two"), first);
    space.pipe(&["plan", "--check"]).code(0);
    assert!(space.pipe(&["cache", "verify"]).code(0).out.contains("all sound"));
}

/// Runs a trial of `benches` for a few seconds; what cannot be tried here is said and passes.
fn trial(script: &str, args: &[&str]) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches").join(script);
    let ran =
        Command::new("python3").arg(script).arg(env!("CARGO_BIN_EXE_pipe")).args(args).output();
    let Ok(ran) = ran else {
        println!("not tried: no python3");
        return;
    };
    let said =
        String::from_utf8_lossy(&ran.stdout).into_owned() + &String::from_utf8_lossy(&ran.stderr);
    match ran.status.code() {
        Some(0) => {}
        Some(77) => println!("not tried: {said}"),
        code => panic!("exit code {code:?}\n{said}"),
    }
}

#[test]
#[ignore = "`.ci/full power` runs it longer: a file system of Python's takes minutes on a loaded machine"]
fn power_cuts_lose_nothing_that_was_finished_and_corrupt_nothing() {
    trial("power_cuts.py", &["200", "8", "7"]);
}
