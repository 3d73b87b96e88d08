//! Looking after the cache: damage, room, and what may go.

use std::fs;
use std::time::{Duration, SystemTime};

use crate::space::{DIAMOND, Space};

fn age(space: &Space, hours: u64) {
    let then = SystemTime::now() - Duration::from_secs(hours * 3600);
    let mut open = vec![space.cache()];
    while let Some(path) = open.pop() {
        if path.is_dir() {
            open.extend(fs::read_dir(&path).unwrap().flatten().map(|e| e.path()));
        }
        fs::File::open(&path).and_then(|file| file.set_modified(then)).unwrap();
    }
}

fn damage(path: &std::path::Path) {
    fs::remove_file(path).unwrap();
    fs::write(path, "other bytes").unwrap();
}

#[test]
fn verify_names_what_is_damaged_and_repair_lets_the_next_run_make_it_anew() {
    let space = Space::new(DIAMOND);
    space.pipe(&["run"]).code(0);
    assert!(space.pipe(&["cache", "verify"]).code(0).out.contains("all sound"));
    damage(&space.objects()[1]);
    fs::remove_file(&space.objects()[2]).unwrap();
    let found = space.pipe(&["cache", "verify"]).code(5).out;
    assert!(found.contains("holds other bytes than its digest says"), "{found}");
    assert!(found.contains("is missing or damaged"), "{found}");
    let repaired = space.pipe(&["cache", "repair"]).code(0).out;
    assert!(repaired.contains("(quarantined)"), "{repaired}");
    let before: usize = space.all_runs().iter().sum();
    space.pipe(&["run"]).code(0);
    assert!(space.all_runs().iter().sum::<usize>() >= before + 2);
    assert!(space.pipe(&["cache", "verify"]).code(0).out.contains("all sound"));
}

#[test]
fn edited_record_is_damage_too() {
    let space = Space::new(DIAMOND);
    space.pipe(&["run"]).code(0);
    let dir = space.cache().join("records-v1/command");
    let record = fs::read_dir(&dir).unwrap().flatten().next().unwrap().path();
    let text = fs::read_to_string(&record).unwrap().replacen("\"left\"", "\"lift\"", 1);
    fs::write(&record, text.replacen("echo", "ecco", 1)).unwrap();
    let found = space.pipe(&["--json", "cache", "verify"]).code(5).out;
    let found: serde_json::Value = serde_json::from_str(&found).unwrap();
    assert_eq!(found["damage"].as_array().unwrap().len(), 1, "{found}");
    assert_eq!(found["damage"][0]["what"], "holds other bytes than its checksum says");
}

#[test]
fn gc_removes_what_no_pipeline_reaches_and_counts_what_is_needed_again() {
    let space = Space::new(DIAMOND);
    space.pipe(&["run"]).code(0);
    space.replace("left: one", "left: three");
    space.pipe(&["run"]).code(0);
    // Nothing goes that is young.
    let gc = ["cache", "gc", "--older-than", "2h"];
    assert!(space.pipe(&gc).code(0).out.contains("removed 0 records, 0 objects"));
    age(&space, 3);
    let dry = space.pipe(&["cache", "gc", "--older-than", "2h", "--dry-run"]).code(0).out;
    assert!(dry.contains("would remove 3 records"), "{dry}");
    let gone = space.pipe(&gc).code(0).out;
    assert!(gone.contains("removed 3 records"), "{gone}");
    assert!(space.pipe(&["cache", "verify"]).code(0).out.contains("all sound"));
    let runs = space.all_runs();
    space.pipe(&["run"]).code(0);
    assert_eq!(space.all_runs(), runs, "what the pipeline reaches is still there");
    space.replace("left: three", "left: one");
    let again = space.pipe(&["run"]).code(0).err;
    assert!(again.contains("gc removed what this made 0 days ago"), "{again}");
    assert!(space.pipe(&["cache", "du"]).code(0).out.contains("3 removed by gc and needed again"));
    let once = space.pipe(&["run", "--force"]).code(0).err;
    assert!(!once.contains("gc removed"), "{once}");
}

#[test]
fn pinned_and_small_enough_stays() {
    let space = Space::new(DIAMOND);
    space.pipe(&["run"]).code(0);
    assert!(space.pipe(&["cache", "pin", "left"]).code(0).out.contains("is kept from gc"));
    space.replace("left: one", "left: three");
    space.pipe(&["run"]).code(0);
    age(&space, 3);
    let roomy = space.pipe(&["cache", "gc", "--max-size", "1GiB"]).code(0).out;
    assert!(roomy.contains("removed 0 records"), "{roomy}");
    let tight = space.pipe(&["cache", "gc", "--max-size", "0"]).code(0).out;
    assert!(tight.contains("removed 2 records"), "{tight}");
    assert!(!tight.lines().any(|l| l.starts_with("left ")), "{tight}");
    let listed = space.pipe(&["cache", "ls"]).code(0).out;
    assert!(listed.contains("a pin"), "{listed}");
    space.replace("left: three", "left: one");
    space.pipe(&["cache", "unpin", "left"]).code(0);
    assert!(!space.pipe(&["cache", "ls"]).code(0).out.contains("a pin"));
}

#[test]
fn what_is_left_behind_goes_and_a_run_collects_when_the_cache_is_over_the_cap() {
    let space = Space::new(DIAMOND);
    space.pipe(&["run"]).code(0);
    let scratch = space.cache().join("scratch/left-behind");
    fs::create_dir_all(&scratch).unwrap();
    fs::write(scratch.join("checkpoint"), "state").unwrap();
    space.replace("left: one", "left: three");
    space.pipe(&["run"]).code(0);
    age(&space, 24 * 15);
    space.replace("right: two", "right: four");
    let run = space.pipe(&["run", "--cache-cap", "1"]).code(0).err;
    assert!(run.contains("the cache was looked through: removed"), "{run}");
    assert!(!scratch.exists());
    // Once a day.
    space.replace("right: four", "right: five");
    let run = space.pipe(&["run", "--cache-cap", "1"]).code(0).err;
    assert!(!run.contains("looked through"), "{run}");
    let wrong = space.command(&["run"]).env("PIPE_CACHE_CAP", "big").output().unwrap();
    assert_eq!(wrong.status.code(), Some(2));
}

#[test]
fn checkpoints_of_unfinished_work_go_by_age_and_size_before_records_do() {
    let space = Space::new(DIAMOND);
    space.pipe(&["run"]).code(0);
    let scratch = space.cache().join("scratch").join("ab".repeat(32)).join("attempt");
    let leave = || {
        fs::create_dir_all(&scratch).unwrap();
        fs::write(scratch.join("checkpoint"), vec![0; 100_000]).unwrap();
    };
    leave();
    let young = space.pipe(&["cache", "gc", "--max-size", "50KiB"]).code(0).out;
    assert!(young.contains("removed 0 records, 0 objects"), "{young}");
    assert!(scratch.exists());
    age(&space, 3);
    let dry = space.pipe(&["cache", "gc", "--max-size", "50KiB", "--dry-run"]).code(0).out;
    assert!(scratch.exists() && dry.contains("would remove 0 records"), "{dry}");
    space.pipe(&["cache", "gc", "--max-size", "200KiB"]).code(0);
    assert!(scratch.exists());
    space.pipe(&["cache", "gc", "--max-size", "50KiB"]).code(0);
    assert!(!scratch.exists());
    leave();
    age(&space, 3);
    space.pipe(&["cache", "gc", "--older-than", "2h"]).code(0);
    assert!(!scratch.exists());
    space.pipe(&["plan", "--check"]).code(0);
}

#[test]
fn projects_with_the_same_name_do_not_let_go_of_each_other_s_artifacts() {
    let space = Space::new(DIAMOND);
    space.pipe(&["run"]).code(0);
    let other = space.outside().join("other");
    fs::create_dir(&other).unwrap();
    let text = fs::read_to_string(space.path("pipeline.yaml")).unwrap();
    fs::write(other.join("pipeline.yaml"), text.replace("left: one", "left: two")).unwrap();
    let cache = space.cache();
    let run = ["run", "--cache", cache.to_str().unwrap()];
    assert!(space.command(&run).current_dir(&other).status().unwrap().success());
    age(&space, 3);
    let gone = space.pipe(&["cache", "gc", "--older-than", "2h"]).code(0).out;
    assert!(gone.contains("removed 0 records"), "{gone}");
    space.pipe(&["plan", "--check"]).code(0);
}

#[test]
fn who_may_not_say_that_the_cache_was_looked_through_says_nothing_at_all() {
    let space = Space::new(DIAMOND);
    let stamp = space.cache().join("gc-stamp");
    fs::create_dir_all(stamp.join("in the way")).unwrap();
    let then = std::time::SystemTime::now() - std::time::Duration::from_secs(2 * 86_400);
    fs::File::open(&stamp).and_then(|file| file.set_modified(then)).unwrap();
    let ran = space.pipe(&["run"]).code(0);
    assert!(!ran.err.contains("looked through"), "{}", ran.err);
}
