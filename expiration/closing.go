package expiration

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/batch"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/index"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/lanes"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/guard"
)

// errNotDue: the timer is not due, or was refreshed after its event was built.
var errNotDue = errors.New("the timer was refreshed")

// errClaimFailed: the row did not match the condition of the claim.
var errClaimFailed = errors.New("the timer could not be claimed")

// maybeWritten reports whether a claim that failed may still have been written.
func maybeWritten(err error) bool {
	return !errors.Is(err, errNotDue) && !errors.Is(err, errClaimFailed) && !errors.Is(err, ErrNotFound) && !errors.Is(err, batch.ErrNotAsked)
}

// isFinal reports whether an error of attempt means that the timer is gone.
func isFinal(err error) bool {
	var dropped *DropError
	return errors.Is(err, ErrNotFound) || errors.As(err, &dropped)
}

// close makes one attempt to close an event, and schedules the next one after a passing fault. It returns
//
//   - nil if the room has the closing event,
//   - ErrNotFound if the timer had ended already,
//   - a *DropError if the attempt ended the timer,
//   - any other error after a passing fault.
//
// When the timer has ended, the caller must call removeRow.
func (t *Timers) close(ctx context.Context, tm *index.Timer, o Outcome, w *lanes.Turn) error {
	t.mu.Lock()
	live := tm.Live()
	t.mu.Unlock()
	if !live { // nothing is sent, so the lock of the state need not be waited for
		return ErrNotFound
	}
	unlock, err := t.lockTimer(ctx, tm)
	if err != nil { // another attempt or a send held a lock for too long
		t.retryLater(tm, Event{}, err)
		return err
	}
	defer unlock()
	return t.attempt(ctx, tm, o, w)
}

// errLocked: another attempt or a send held a lock for too long. That does not count as a failure of the attempt that waited.
var errLocked = errors.New("waiting for another attempt, or a send")

// lockTimer takes the locks that an attempt needs: that of the timer, and that of its piece of state.
func (t *Timers) lockTimer(ctx context.Context, tm *index.Timer) (unlock func(), err error) {
	state := tm.State()
	unlockAttempts, err := t.attempting.Lock(ctx, tm.NID())
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errLocked, err)
	}
	if state == 0 {
		return unlockAttempts, nil
	}
	unlockState, err := t.states.Lock(ctx, state)
	if err != nil {
		unlockAttempts()
		return nil, fmt.Errorf("%w: %w", errLocked, err)
	}
	t.mu.Lock()
	t.heldStates[state] = struct{}{}
	t.mu.Unlock()
	return func() {
		t.mu.Lock()
		delete(t.heldStates, state)
		t.mu.Unlock()
		unlockState()
		unlockAttempts()
	}, nil
}

// attempt is close under the lock of the timer's state, or under Timers.attempting if it has none. LockState holds only the former. A panic
// schedules the next attempt.
func (t *Timers) attempt(ctx context.Context, tm *index.Timer, o Outcome, w *lanes.Turn) error {
	t.mu.Lock()
	t.index.Attempt(tm)
	t.mu.Unlock()
	defer t.returned(tm)
	err := batch.ErrUndecided
	if !guard.Run("closing an event", func() { err = t.attemptUnguarded(ctx, tm, o, w) }) {
		t.scheduleRetry(tm)
	}
	return err
}

func (t *Timers) attemptUnguarded(ctx context.Context, tm *index.Timer, o Outcome, w *lanes.Turn) error {
	row, due, err := t.load(ctx, tm)
	switch {
	case errors.Is(err, ErrNotFound):
		return err
	case err != nil:
		t.retryLater(tm, Event{}, err)
		return err
	case row.Claim == nil: // an earlier attempt's claim in memory only, see claim
		t.mu.Lock()
		t.index.Unclaim(tm)
		t.mu.Unlock()
	}
	err = t.try(ctx, tm, &row, o, due, w)
	return t.conclude(ctx, tm, row, o, due, err)
}

// try makes an attempt without acting on its result, and notes a claim in the row. The content comes from a client and passes through
// Dendrite's code, so a panic is treated as an error of this attempt.
func (t *Timers) try(ctx context.Context, tm *index.Timer, row *Timer, o Outcome, due time.Duration, w *lanes.Turn) (err error) {
	defer recovered(&err)
	notDue := due > t.clock.now()
	if row.Delayed == nil && row.Claim == nil && (o != Expired || !notDue) {
		if err = t.confirm(ctx, tm, row.Event); err != nil {
			return err
		}
	}
	switch {
	case row.Claim != nil:
		t.noteInFlight(tm, *row)
		failpoint.Pass(failpoint.BeforeResubmit)
		if err = follow(ctx, w, row.Claim.Event, false); err == nil {
			err = t.roomserver.Resubmit(ctx, *row, row.Claim.Event)
		}
		return err
	case o == Expired && notDue:
		if t.isDoubtful(tm) {
			err = t.dropDoubtful(ctx, tm, *row)
		}
		return cmp.Or(err, errNotDue)
	case row.Delayed != nil:
		return t.sendDelayed(ctx, tm, row, o, due, w)
	}
	claim := func(ctx context.Context, closing SignedEvent) error {
		c := Claim{Outcome: o, Event: closing}
		if err := t.claim(ctx, tm, due, c); err != nil {
			return err
		}
		row.Claim = &c
		return follow(ctx, w, closing, !row.Event.affectsAuth())
	}
	return t.roomserver.Close(ctx, row.Event, o, t.closingTimestamp(o, due), t.isLost(tm), claim)
}

// follow waits for the room's previous turn once an event is built, and lets the next turn begin if it may be early.
func follow(ctx context.Context, w *lanes.Turn, e SignedEvent, early bool) error {
	return w.Follow(ctx, e.EventID, e.isUpon, early)
}

// closingTimestamp returns the origin_server_ts of a closing event. An expired event bears its deadline, however late the closing event is
// built: if newer state from another server crosses it, state resolution prefers the later time, which is whatever was sent after the
// deadline. The deadline is converted by the present wall clock, and rounded up.
func (t *Timers) closingTimestamp(o Outcome, due time.Duration) time.Time {
	if o == Expired {
		return t.clock.stored(due)
	}
	return t.clock.stored(t.clock.now())
}

// confirm asks the roomserver to make sure that an event is in its room, unless this process already knows that it is.
func (t *Timers) confirm(ctx context.Context, tm *index.Timer, e Event) error {
	t.mu.Lock()
	confirmed := tm.Presence == index.Confirmed
	t.mu.Unlock()
	if confirmed {
		return nil
	}
	failpoint.Pass(failpoint.BeforeConfirm)
	if err := t.roomserver.Confirm(ctx, e); err != nil {
		return err
	}
	failpoint.Pass(failpoint.AfterConfirm)
	t.noteConfirmed(tm)
	return nil
}

// claim writes into the timer's row how the timer ends. An expiry is refused with errNotDue if the timer was refreshed since the closing
// event was built: the event bears a time at which the timer was not due, even if the new deadline has passed too. A claim without a PDU,
// for an event that the room has already, changes only memory, because there is nothing to send again.
func (t *Timers) claim(ctx context.Context, tm *index.Timer, due time.Duration, c Claim) error {
	unlock, err := t.lockRow(ctx, tm)
	if err != nil {
		return err
	}
	defer unlock()
	t.mu.Lock()
	if !tm.Running() {
		t.mu.Unlock()
		return ErrNotFound
	}
	deadline := time.UnixMilli(tm.Deadline)
	notDue := c.Outcome == Expired && (tm.Due > t.clock.now() || tm.Due != due)
	t.mu.Unlock()
	if notDue {
		return errNotDue
	}
	failpoint.Pass(failpoint.BeforeClaim)
	ok := true
	if c.Event.PDU != nil {
		ok, err = t.claims.Do(ctx, ConditionalClaim{NID: tm.NID(), Deadline: deadline, Claim: c})
	}
	failpoint.Pass(failpoint.AfterClaim)
	t.mu.Lock()
	defer t.mu.Unlock()
	if err != nil || !ok {
		if !errors.Is(err, batch.ErrNotAsked) {
			tm.Doubt(index.RowUnsure)
		}
		if err == nil {
			return errClaimFailed
		}
		return fmt.Errorf("claiming a timer: %w", err)
	}
	t.index.Claim(tm)
	return nil
}
