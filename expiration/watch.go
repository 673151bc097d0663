package expiration

import (
	"context"
	"errors"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/batch"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/index"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/lanes"
)

// watch hands timers to the lanes when they are due. It uses one runtime timer, which is reset when a nearer wake comes. A poll behind it
// bounds the cost of a lost wake-up.
func (t *Timers) watch() {
	alarm := time.NewTimer(0)
	defer alarm.Stop()
	for {
		select {
		case <-t.ctx.Done():
			return
		case <-t.wakeup:
		case <-alarm.C:
		}
		alarm.Reset(t.dispatch(t.clock.now()))
	}
}

// dispatch hands all timers that are due to the lanes, and returns the time until it must be called again.
func (t *Timers) dispatch(now time.Duration) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	if now-t.forgotAt > retriedFor {
		t.index.ForgetRequests()
		t.forgotAt = now
	}
	for tm := t.index.First(); tm != nil; tm = t.index.First() {
		if wake, _ := tm.Wake(); wake > now {
			return min(wake-now, pollInterval)
		}
		if tm.Running() && tm.Due > now && !tm.Has(index.MaybeReplaced|index.RowUnsure) { // refreshed since it was scheduled
			t.index.Schedule(tm, tm.Due)
			continue
		}
		until, refused := t.index.Refused(tm)
		if refused && until <= now {
			t.index.ForgetToken(tm)
		}
		if tm.Phase() == index.Gone { // only its token is, or was, still in the index
			t.index.Schedule(tm, until)
			continue
		}
		t.index.HandOver(tm)
		// Clients show messages in the order of the event graph. A fork would let them see delayed messages in another order.
		job := lanes.Job{
			Sender: tm.Sender(), Due: tm.Due, Sequential: tm.Delayed() && tm.State() == 0,
			Attempt: func(w *lanes.Turn) bool { return t.closeDue(tm, w) },
		}
		// A timer whose attempt failed at once keeps its place in its room's order. A retry is one that the roomserver did not answer.
		t.lanes.Add(job, tm.Room(), tm.Unanswered)
	}
	return pollInterval
}

// closeDue makes an attempt in the timer's turn, and reports whether it failed in passing. The row is deleted in the background, so that in
// a mass expiry the next turn does not wait for it.
func (t *Timers) closeDue(tm *index.Timer, w *lanes.Turn) (failed bool) {
	defer t.returned(tm)
	ctx, cancel := context.WithTimeout(t.ctx, t.patience(tm))
	defer cancel()
	// close schedules the next attempt and logs the error.
	err := t.close(ctx, tm, Expired, w)
	t.removeRowBehind(tm)
	for _, blameless := range []error{errNotDue, errLocked, batch.ErrNotAsked, lanes.ErrTurnBefore} {
		if errors.Is(err, blameless) {
			return false
		}
	}
	return err != nil && !isFinal(err)
}

// returned notes that an attempt is over.
func (t *Timers) returned(tm *index.Timer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.index.Returned(tm)
}

// scheduleRetry schedules the timer after a backoff that grows with each failure. It returns the number of failures.
func (t *Timers) scheduleRetry(tm *index.Timer) (failures int) {
	t.mu.Lock()
	if tm.Phase() != index.Gone {
		failures = min(int(tm.Failures)+1, maxFailures)
		tm.Failures = uint8(failures)
		wake := t.clock.now() + min(firstPause<<(failures-1), lastPause)
		if planned, scheduled := tm.Wake(); scheduled { // frequent requests do not postpone a planned attempt
			wake = min(wake, planned)
		}
		t.index.Schedule(tm, wake)
	}
	t.mu.Unlock()
	t.notify()
	return failures
}

// notify tells the scheduler that the first wake may have come nearer.
func (t *Timers) notify() {
	select {
	case t.wakeup <- struct{}{}:
	default:
	}
}
