//! The same work on many things, by as many threads as pay.

use std::num::NonZero;
use std::thread;

/// More threads than this only wait for the file system.
const MOST: usize = 8;

/// `work` on every item, in order; a thread more for every `fewest` items.
pub(crate) fn map<T: Sync, R: Send>(
    items: &[T],
    fewest: usize,
    work: impl Fn(&T) -> R + Sync,
) -> Vec<R> {
    let cores = thread::available_parallelism().map_or(1, NonZero::get).min(MOST);
    let threads = cores.min(items.len() / fewest.max(1)).max(1);
    if threads == 1 {
        return items.iter().map(work).collect();
    }
    let work = &work;
    let done: Vec<Vec<R>> = thread::scope(|scope| {
        let mut shares = items.chunks(items.len().div_ceil(threads));
        let own = shares.next().unwrap_or_default();
        let others: Vec<_> = shares
            .map(|share| scope.spawn(move || share.iter().map(work).collect::<Vec<R>>()))
            .collect();
        let own: Vec<R> = own.iter().map(work).collect();
        let ended = others.into_iter().map(|thread| match thread.join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        std::iter::once(own).chain(ended).collect()
    });
    done.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_is_kept_however_many_threads() {
        for count in [0, 1, 7, 1000] {
            let items: Vec<usize> = (0..count).collect();
            let doubled: Vec<usize> = items.iter().map(|i| i * 2).collect();
            assert_eq!(map(&items, 1, |i| i * 2), doubled);
        }
    }
}
