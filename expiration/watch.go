package expiration

import (
	"context"
	"errors"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/batch"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/index"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/lanes"
)

// watch hands timers to the lanes when they are due. There is one runtime timer, moved when something nearer comes; a
// poll behind it bounds what a lost wake-up can cost.
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

// dispatch hands all timers that are due to the lanes and returns how long it is until it has to be called again.
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
		if tm.Running() && tm.Due > now && !tm.Has(index.MaybeReplaced) { // refreshed since it was put there
			t.index.Schedule(tm, tm.Due)
			continue
		}
		t.index.ForgetToken(tm)
		if tm.Phase() == index.Gone { // only its token was still known
			continue
		}
		t.index.HandOver(tm)
		// What failed at once keeps its place in the order of its room: a retry is what the roomserver did not answer.
		attempt := func(w *lanes.Turn) bool { return t.closeDue(tm, w) }
		t.lanes.Add(lanes.Job{Sender: tm.Sender(), Due: tm.Due, Attempt: attempt}, tm.Room(), tm.Unanswered > 0)
	}
	return pollInterval
}

// closeDue is an attempt in the timer's turn, and reports whether it failed in passing. When many run out at once, nobody waits for
// the rows to be deleted.
func (t *Timers) closeDue(tm *index.Timer, w *lanes.Turn) (failed bool) {
	defer t.returned(tm)
	ctx, cancel := context.WithTimeout(t.ctx, t.patience(tm))
	defer cancel()
	// close schedules the next attempt and has said what there is to say.
	err := t.close(ctx, tm, Expired, w)
	t.removeRowBehind(tm)
	for _, blameless := range []error{errNotDue, errLocked, batch.ErrNotAsked, lanes.ErrTurnBefore} {
		if errors.Is(err, blameless) {
			return false
		}
	}
	return err != nil && !isFinal(err)
}

// returned is called when an attempt is over.
func (t *Timers) returned(tm *index.Timer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.index.Returned(tm)
}

// scheduleRetry makes the scheduler look at the timer again after a pause that grows with each failure. It returns how
// many there were.
func (t *Timers) scheduleRetry(tm *index.Timer) (failures int) {
	t.mu.Lock()
	if tm.Phase() != index.Gone {
		failures = min(int(tm.Failures)+1, maxFailures)
		tm.Failures = uint8(failures)
		wake := t.clock.now() + min(firstPause<<(failures-1), lastPause)
		if planned, scheduled := tm.Wake(); scheduled { // whoever asks often does not put off what is planned
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
