package expiration

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/batch"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/index"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/guard"
)

// lockRow takes the lock of a timer's row, and returns the function that gives it back. The row is written only under this lock, so that
// memory agrees with the last write. A caller whose context ends before it has the lock gives up with batch.ErrNotAsked. The holder waits
// for nothing but the database.
func (t *Timers) lockRow(ctx context.Context, tm *index.Timer) (unlock func(), err error) {
	if unlock, err = t.rows.Lock(ctx, tm.NID()); err != nil {
		return nil, fmt.Errorf("%w: %w", batch.ErrNotAsked, err)
	}
	return unlock, nil
}

// load reads the row of a timer, and updates memory from it. It also returns the deadline by the monotonic clock. The error is ErrNotFound
// if the timer has ended.
func (t *Timers) load(ctx context.Context, tm *index.Timer) (row Timer, due time.Duration, err error) {
	unlock, err := t.lockRow(ctx, tm)
	if err != nil {
		return row, 0, err
	}
	defer unlock()
	return t.loadUnderRow(ctx, tm)
}

// loadUnderRow is load under the row's lock.
func (t *Timers) loadUnderRow(ctx context.Context, tm *index.Timer) (row Timer, due time.Duration, err error) {
	t.mu.Lock()
	if !tm.Live() {
		t.mu.Unlock()
		return row, 0, ErrNotFound
	}
	t.mu.Unlock()
	found, err := t.reads.Do(ctx, tm.NID())
	if err != nil {
		return row, 0, fmt.Errorf("reading a timer: %w", err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if !tm.Live() {
		return row, 0, ErrNotFound
	}
	if found == nil {
		if tm.Delayed() && tm.Phase() == index.Claimed { // it was finalised, although the write returned an error
			t.senders[tm.Sender()] = t.round
			t.forgetInFlightWithMu(tm)
		}
		t.index.Stop(tm)
		t.index.Forget(tm)
		return row, 0, ErrNotFound
	}
	row = *found
	tm.Resolve(index.RowUnsure)
	tm.Duration = row.Duration
	if row.Claim != nil {
		t.index.Claim(tm)
	}
	if deadline := row.Deadline.UnixMilli(); deadline != tm.Deadline {
		tm.Deadline, tm.Due = deadline, t.clock.moment(row.Deadline)
	}
	return row, tm.Due, nil
}

// removeRow deletes the row of a timer that has ended, unless it is deleted already. If that fails, the scheduler tries again later. The
// row is deleted even if a failed claim was written, because the roomserver never got that claim's event.
func (t *Timers) removeRow(ctx context.Context, tm *index.Timer) {
	unlock, err := t.lockRow(ctx, tm)
	if err != nil {
		t.mu.Lock()
		left := tm.IsLeft()
		t.mu.Unlock()
		if left {
			t.scheduleRetry(tm)
		}
		return
	}
	defer unlock()
	t.removeRowUnderRow(ctx, tm)
}

// removeRowUnderRow is removeRow under the row's lock.
func (t *Timers) removeRowUnderRow(ctx context.Context, tm *index.Timer) {
	t.mu.Lock()
	left := tm.IsLeft()
	remove := t.drops
	if tm.Phase() == index.Finished || tm.Has(index.RowUnsure) {
		remove = t.deletes
	}
	t.mu.Unlock()
	if !left {
		return
	}
	_, err := remove.Do(ctx, tm.NID())
	t.noteRemoved(err, tm)
}

// removeRowBehind is removeRow in the background. The rows of closed events are collected and deleted together, as nothing writes to them
// any more.
func (t *Timers) removeRowBehind(tm *index.Timer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch tm.Phase() {
	case index.Stopped:
		t.watcher.Go(func() {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(t.ctx), batch.Timeout) // also while the engine stops
			defer cancel()
			if !guard.Run("deleting a row", func() { t.removeRow(ctx, tm) }) {
				t.scheduleRetry(tm)
			}
		})
	case index.Finished:
		if t.swept = append(t.swept, tm); len(t.swept) == 1 {
			t.watcher.Go(func() { guard.Run("deleting rows", t.sweep) })
		}
	}
}

// sweep deletes the collected rows of closed events after sweepPause, or when the engine stops.
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
		for i, tm := range some {
			nids[i] = tm.NID()
		}
		err := batch.ErrUndecided
		guard.Run("deleting rows", func() { err = t.store.Delete(ctx, nids) })
		t.noteRemoved(err, some...)
	}
}

// noteRemoved forgets timers whose rows are deleted, or schedules a retry if deleting failed.
func (t *Timers) noteRemoved(err error, timers ...*index.Timer) {
	failpoint.Pass(failpoint.AfterDelete)
	if err == nil {
		t.mu.Lock()
		defer t.mu.Unlock()
		for _, tm := range timers {
			t.index.Forget(tm)
		}
		return
	}
	for _, tm := range timers {
		t.metrics.errors.WithLabelValues("delete").Inc()
		t.log.WithError(err).WithField("timer_nid", tm.NID()).Error("Failed to delete a timer's row")
		t.scheduleRetry(tm)
	}
}

// DeleteStopped deletes the rows of stopped timers that could not be deleted earlier. Until it has returned nil, a crash could bring a
// stopped timer back.
func (t *Timers) DeleteStopped(ctx context.Context) error {
	for _, tm := range t.stoppedWithRow() {
		t.removeRow(ctx, tm)
	}
	if err := ctx.Err(); err != nil {
		return err // drop may have failed, so that a timer still runs
	}
	if n := len(t.stoppedWithRow()); n > 0 {
		return fmt.Errorf("%d stopped timers still have their rows", n)
	}
	return nil
}

// stoppedWithRow returns the timers that were stopped and still have their rows. Closed timers are not among them: their attempt deletes
// the row, and a crash before that only resubmits a closing event that the room has already.
func (t *Timers) stoppedWithRow() (timers []*index.Timer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for tm := range t.index.Left() {
		if tm.Phase() == index.Stopped {
			timers = append(timers, tm)
		}
	}
	return timers
}
