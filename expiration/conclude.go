package expiration

import (
	"context"
	"errors"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/batch"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/index"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/lanes"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
)

// conclude acts on the result of an attempt.
func (t *Timers) conclude(ctx context.Context, tm *index.Timer, row Timer, o Outcome, due time.Duration, err error) error {
	switch {
	case err == nil:
		return t.succeeded(ctx, tm, row, o)
	case isAwaited(err):
		err = t.countAwaited(ctx, tm, row.Event, o, err)
	case isUnsendable(err):
		err = t.countUnsendable(tm, row, o, err)
	case row.Claim != nil && !errors.Is(err, lanes.ErrTurnBefore):
		err = t.countUntaken(ctx, tm, row.Event, o, err)
	}
	if dropped := (*DropError)(nil); errors.As(err, &dropped) {
		err = t.abandon(ctx, tm, row, o, due, dropped)
	} else {
		t.retryLater(tm, row.Event, err)
	}
	return err
}

// isAwaited reports whether an attempt failed because the roomserver has not caught up after a crash.
func isAwaited(err error) bool { return errors.Is(err, ErrUnknownEvent) || errors.Is(err, ErrSetBack) }

// countAwaited counts how many times in a row the roomserver had not caught up when a timer was due, and wakes the roomserver. It returns
// the error, or a *DropError if the limit is reached.
func (t *Timers) countAwaited(ctx context.Context, tm *index.Timer, e Event, o Outcome, err error) error {
	unsent := errors.Is(err, ErrUnknownEvent)
	t.mu.Lock()
	if o == Expired { // requests do not count: clients repeat them as often as they like
		tm.Awaited = min(tm.Awaited+1, givenUpAfter+1)
	}
	switch {
	case unsent:
		tm.Presence = index.Unsent
	case tm.Presence == index.Unsent: // the roomserver knows the event now
		tm.Presence = index.Unconfirmed
	}
	givenUp := unsent && tm.Awaited > givenUpAfter
	t.mu.Unlock()
	if givenUp {
		return &DropError{Reason: NeverSent, Cause: err}
	}
	if failed := t.roomserver.Wake(ctx, e.RoomID); failed != nil { // the next attempt wakes it again
		t.log.WithError(failed).WithField("room_id", e.RoomID).Debug("Failed to wake the roomserver's worker for a room")
	}
	return err
}

// isLost reports whether the engine has waited long enough for an event to become the current state again. By then the roomserver's queue
// has nothing left that could restore it. Other servers, and the room's event graph, still have the event.
func (t *Timers) isLost(tm *index.Timer) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return tm.Awaited > lostAfter || tm.Awaited > 0 && failpoint.Fail(failpoint.Awaiting) != nil
}

// succeeded ends a timer whose event is in the room. It returns ErrNotFound if the claimed outcome is not the one that the caller wanted,
// because then the token was invalid before the request.
func (t *Timers) succeeded(ctx context.Context, tm *index.Timer, row Timer, o Outcome) error {
	failpoint.Pass(failpoint.AfterClosing)
	t.mu.Lock()
	t.lastAnswer = t.clock.now()
	late := t.lastAnswer - tm.Due
	if row.Delayed == nil {
		t.index.RememberRequest(tm, row.Event.ID)
		t.index.Stop(tm)
	}
	t.mu.Unlock()
	if row.Claim.Outcome == Expired {
		t.metrics.lateness.Observe(late.Seconds())
	}
	if row.Delayed != nil {
		if err := t.finaliseSent(ctx, tm, row); err != nil {
			return err
		}
	} else {
		t.metrics.closings.WithLabelValues(string(row.Claim.Outcome)).Inc()
		t.log.WithFields(logrus.Fields{
			"event_id": row.Event.ID, "room_id": row.Event.RoomID,
			"closing_event_id": row.Claim.Event.EventID, "outcome": row.Claim.Outcome,
		}).Info("Closed an expiring event")
	}
	if row.Claim.Outcome != o {
		return ErrNotFound
	}
	return nil
}

// abandon ends a timer whose event will never be sent. It returns the reason, or a passing fault if the timer could not be ended. The timer
// runs on if it was refreshed during the attempt and the reason may not hold at the new deadline.
func (t *Timers) abandon(ctx context.Context, tm *index.Timer, row Timer, o Outcome, due time.Duration, dropped *DropError) error {
	// The attempt may have used up its own time.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), batch.Timeout)
	defer cancel()
	unlock, err := t.lockRow(ctx, tm)
	if err != nil {
		t.retryLater(tm, row.Event, err)
		return err
	}
	defer unlock()
	if o == Expired && row.Claim == nil && reasons[dropped.Reason].mayPass && t.isRefreshed(tm, due) {
		t.retryLater(tm, row.Event, errNotDue)
		return errNotDue
	}
	if row.Delayed != nil {
		if err := t.finaliseUnderRow(ctx, tm, t.finalOf(dropped), false); err != nil {
			t.retryLater(tm, row.Event, err)
			return err
		}
		if dropped.Reason == Deactivated { // CancelAll has missed the event
			if err := t.erase(ctx, row.Event.Sender); err != nil {
				t.log.WithError(err).WithField("user_id", row.Event.Sender).Error("Failed to delete what a deactivated account has scheduled")
			}
		}
		return dropped
	}
	t.mu.Lock()
	already := !tm.Live()
	if dropped.Reason == Redacted {
		t.index.RememberRequest(tm, row.Event.ID)
	}
	t.index.Stop(tm)
	t.mu.Unlock()
	if already { // dropped by another caller meanwhile
		return dropped
	}
	t.metrics.drops.WithLabelValues(string(dropped.Reason)).Inc()
	t.log.WithError(dropped.Cause).WithFields(logrus.Fields{
		"event_id": row.Event.ID, "room_id": row.Event.RoomID, "reason": dropped.Reason,
	}).Info("Dropped the timer of an expiring event")
	return dropped
}

// isRefreshed reports whether a timer runs and has another deadline than the given one. The caller holds the row's lock.
func (t *Timers) isRefreshed(tm *index.Timer, due time.Duration) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return tm.Running() && tm.Due != due
}

// retryLater schedules the next attempt after a passing fault. The event is empty if the row could not be read.
func (t *Timers) retryLater(tm *index.Timer, e Event, err error) {
	if t.ctx.Err() != nil { // stopping: the next Start loads the timer
		return
	}
	t.mu.Lock()
	if !tm.Live() {
		t.mu.Unlock()
		return
	}
	if tm.Running() && !tm.Has(index.RowUnsure|index.MaybeReplaced) && (tm.Due > t.clock.now() || errors.Is(err, errNotDue)) {
		tm.Failures = 0
		t.index.Schedule(tm, tm.Due)
		t.mu.Unlock()
		t.notify()
		return
	}
	t.mu.Unlock()
	failures := t.scheduleRetry(tm)
	t.metrics.retries.Inc()
	log := t.log.WithError(err).WithFields(logrus.Fields{
		"timer_nid": tm.NID(), "event_id": e.ID, "room_id": e.RoomID, "failures": failures,
	})
	if isAwaited(err) || errors.Is(err, errClaimFailed) {
		log.Debug("An attempt failed, will try again")
		return
	}
	log.Warn("An attempt failed, will try again")
}
