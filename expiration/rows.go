package expiration

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/batch"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/guard"
)

// lockRow takes the lock under which a timer's row is written, so that what memory says of the row is what was written
// last, and returns the function that gives it back. Meanwhile a timer that was found stays in its place, gone or not: it is
// given to another only when the row is deleted. A caller whose context ends while another has the lock gives up: the error is
// batch.ErrNotAsked then. Whoever has it waits for nothing but the database.
func (t *Timers) lockRow(ctx context.Context, r ref) (unlock func(), err error) {
	if unlock, err = t.rows.Lock(ctx, r.nid); err != nil {
		return nil, fmt.Errorf("%w: %w", batch.ErrNotAsked, err)
	}
	return unlock, nil
}

// load reads the row of a timer, and makes memory say what it says. It returns the moment of the deadline too, and
// ErrNotFound if the timer is gone.
func (t *Timers) load(ctx context.Context, r ref) (row Timer, due time.Duration, err error) {
	unlock, err := t.lockRow(ctx, r)
	if err != nil {
		return row, 0, err
	}
	defer unlock()
	return t.loadLocked(ctx, r)
}

// loadLocked is load under the row's lock.
func (t *Timers) loadLocked(ctx context.Context, r ref) (row Timer, due time.Duration, err error) {
	t.mu.Lock()
	tm := t.index.at(r)
	if tm == nil || tm.gone {
		t.mu.Unlock()
		return row, 0, ErrNotFound
	}
	t.mu.Unlock()
	found, err := t.reads.Do(ctx, r.nid)
	if err != nil {
		return row, 0, fmt.Errorf("reading a timer: %w", err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if tm = t.index.at(r); tm == nil || tm.gone {
		return row, 0, ErrNotFound
	}
	if found == nil {
		if tm.delayed && tm.claimed { // and finalised, though that failed
			t.senders[tm.sender] = struct{}{}
			t.forgetClaimed(r)
		}
		t.index.remove(r)
		t.index.forgetRow(r)
		return row, 0, ErrNotFound
	}
	row = *found
	tm.unsure, tm.claimed, tm.duration = false, row.Claim != nil, row.Duration
	if deadline := row.Deadline.UnixMilli(); deadline != tm.deadline {
		tm.deadline, tm.due = deadline, t.clock.moment(row.Deadline)
	}
	return row, tm.due, nil
}

// removeRow deletes the row of a timer that is gone, unless somebody has done so. If that fails, the scheduler tries again
// later. A claim that failed goes too, written or not: its event was given to nobody.
func (t *Timers) removeRow(ctx context.Context, r ref) {
	unlock, err := t.lockRow(ctx, r)
	if err != nil {
		t.mu.Lock()
		left := t.isLeft(r)
		t.mu.Unlock()
		if left {
			t.scheduleRetry(r)
		}
		return
	}
	defer unlock()
	t.removeRowLocked(ctx, r)
}

// isLeft reports whether a timer is gone and its row is not yet deleted. Timers.mu is held.
func (t *Timers) isLeft(r ref) bool {
	tm := t.index.at(r)
	return tm != nil && tm.left
}

// removeRowLocked is removeRow under the row's lock.
func (t *Timers) removeRowLocked(ctx context.Context, r ref) {
	t.mu.Lock()
	tm := t.index.at(r)
	left := tm != nil && tm.left
	remove := t.drops
	if left && (tm.claimed || tm.unsure) {
		remove = t.deletes
	}
	t.mu.Unlock()
	if !left {
		return
	}
	_, err := remove.Do(ctx, r.nid)
	t.removed(err, r)
}

// removeRowBehind is removeRow for whoever has other things to do: the row of a closed event is deleted later, with those of
// others. Nobody writes to it any more.
func (t *Timers) removeRowBehind(r ref) {
	t.mu.Lock()
	defer t.mu.Unlock()
	tm := t.index.at(r)
	switch {
	case tm == nil || !tm.left:
	case !tm.claimed:
		t.watcher.Go(func() {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(t.ctx), batch.Timeout) // also when the component stops
			defer cancel()
			if !guard.Run("deleting a row", func() { t.removeRow(ctx, r) }) {
				t.scheduleRetry(r)
			}
		})
	default:
		if t.swept = append(t.swept, r); len(t.swept) == 1 {
			t.watcher.Go(func() { guard.Run("deleting rows", t.sweep) })
		}
	}
}

// sweep deletes the rows of closed events, when they have gathered for a while, or the component stops.
func (t *Timers) sweep() {
	select {
	case <-time.After(sweepPause):
	case <-t.ctx.Done():
	}
	t.mu.Lock()
	swept := t.swept
	t.swept = nil
	t.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.ctx), batch.Timeout)
	defer cancel()
	for some := range slices.Chunk(swept, batch.Max) {
		nids := make([]int64, len(some))
		for i, r := range some {
			nids[i] = r.nid
		}
		err := batch.ErrUndecided
		guard.Run("deleting rows", func() { err = t.store.Delete(ctx, nids) })
		t.removed(err, some...)
	}
}

// removed does what follows from an attempt to delete rows.
func (t *Timers) removed(err error, timers ...ref) {
	failpoint.Pass(failpoint.AfterDelete)
	if err == nil {
		t.mu.Lock()
		defer t.mu.Unlock()
		for _, r := range timers {
			t.index.forgetRow(r)
		}
		return
	}
	for _, r := range timers {
		t.metrics.errors.WithLabelValues("delete").Inc()
		t.log.WithError(err).WithField("timer_nid", r.nid).Error("Failed to delete the timer of an expiring event")
		t.scheduleRetry(r)
	}
}

// Settle deletes the rows of timers that were stopped and could not be deleted then. Until it has returned nil, a crash
// could bring back a timer that was stopped before.
func (t *Timers) Settle(ctx context.Context) error {
	for _, r := range t.stopped() {
		t.removeRow(ctx, r)
	}
	if err := ctx.Err(); err != nil {
		return err // a timer that should have been dropped may still run
	}
	if n := len(t.stopped()); n > 0 {
		return fmt.Errorf("%d stopped timers still have their rows", n)
	}
	return nil
}

// stopped returns the timers that were stopped and still have their rows. Those of closed events are not among them: they are
// deleted by whoever closed them, and what a crash could bring back is the closing event that the room has.
func (t *Timers) stopped() (timers []ref) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for r := range t.index.left {
		if !t.index.at(r).claimed {
			timers = append(timers, r)
		}
	}
	return timers
}
