package expiration

import (
	"context"
	"errors"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/batch"
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
	if now-t.forgot > retriedFor {
		t.index.forgetRequests()
		t.forgot = now
	}
	for t.index.wakes.Len() > 0 {
		r := t.index.ref(t.index.wakes.slots[0])
		tm := t.index.at(r)
		if tm.wake > now {
			return min(tm.wake-now, pollInterval)
		}
		if tm.running() && tm.due > now && !tm.doubtful { // refreshed since it was put there
			t.index.schedule(r, tm.due)
			continue
		}
		t.index.unschedule(r)
		if !tm.gone || tm.left {
			// What failed at once keeps its place in the order of its room: a retry is what the roomserver did not answer.
			attempt := func(w *lanes.Turn) bool { return t.closeDue(r, w) }
			t.lanes.Add(lanes.Job{Sender: tm.sender, Due: tm.due, Attempt: attempt}, tm.room, tm.unanswered > 0)
		}
		if tm.refused {
			t.index.forgetToken(r)
		}
	}
	return pollInterval
}

// closeDue is an attempt in the timer's turn, and reports whether it failed in passing. When many run out at once, nobody waits for
// the rows to be deleted.
func (t *Timers) closeDue(r ref, w *lanes.Turn) (failed bool) {
	ctx, cancel := context.WithTimeout(t.ctx, t.patience(r))
	defer cancel()
	// close schedules the next attempt and has said what there is to say.
	err := t.close(ctx, r, Expired, w)
	t.removeRowBehind(r)
	for _, blameless := range []error{errNotDue, errLocked, batch.ErrNotAsked, lanes.ErrTurnBefore} {
		if errors.Is(err, blameless) {
			return false
		}
	}
	return err != nil && !isFinal(err)
}

// scheduleRetry makes the scheduler look at the timer again after a pause that grows with each failure. It returns how
// many there were.
func (t *Timers) scheduleRetry(r ref) (failures int) {
	t.mu.Lock()
	if tm := t.index.at(r); tm != nil {
		failures = min(int(tm.failures)+1, maxFailures)
		tm.failures = uint8(failures)
		wake := t.clock.now() + min(firstPause<<(failures-1), lastPause)
		if tm.place >= 0 { // whoever asks often does not put off what is planned
			wake = min(wake, tm.wake)
		}
		t.index.schedule(r, wake)
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
