package expiration

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
)

// errNotDue: the timer was refreshed since its closing event began to be built, or before.
var errNotDue = errors.New("the timer was refreshed")

// errClaimFailed: the row was not as it was seen, or nobody knows.
var errClaimFailed = errors.New("the timer could not be claimed")

// isFinal reports whether an error of attempt means that the timer is gone.
func isFinal(err error) bool {
	var dropped *DropError
	return errors.Is(err, ErrNotFound) || errors.As(err, &dropped)
}

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
		alarm.Reset(t.dispatch(time.Now()))
	}
}

// dispatch hands all timers that are due to the lanes and returns how long it is until it has to be called again.
func (t *Timers) dispatch(now time.Time) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	if now.Sub(t.forgot) > retriedFor {
		t.index.forgetRequests()
		t.forgot = now
	}
	for len(t.index.wakes) > 0 {
		tm := t.index.wakes[0]
		if tm.wake.After(now) {
			return min(tm.wake.Sub(now), pollInterval)
		}
		if tm.running() && tm.due.After(now) { // refreshed since it was put there
			t.index.schedule(tm, tm.due)
			continue
		}
		t.index.unschedule(tm)
		if tm.refused {
			t.index.forget(tm)
		}
		if _, left := t.index.left[tm]; left || !tm.gone {
			t.lanes.add(tm, tm.due)
		}
	}
	return pollInterval
}

// closeDue is what a worker does with a timer.
func (t *Timers) closeDue(tm *timer) {
	ctx, cancel := context.WithTimeout(t.ctx, attemptTimeout)
	defer cancel()
	// close schedules the next attempt and has said what there is to say.
	_ = t.close(ctx, tm, Expired)
}

// recover finishes what an earlier process claimed: room by room in the order of the deadlines, several rooms at once.
// What fails is tried again later, like any other closing.
func (t *Timers) recover(claimed []*timer) {
	ctx, cancel := context.WithTimeout(t.ctx, recoverTimeout)
	defer cancel()
	rooms := map[string][]*timer{}
	var order []string
	for _, tm := range claimed { // in the order of their deadlines
		if _, ok := rooms[tm.event.RoomID]; !ok {
			order = append(order, tm.event.RoomID)
		}
		rooms[tm.event.RoomID] = append(rooms[tm.event.RoomID], tm)
	}
	var done sync.WaitGroup
	free := make(chan struct{}, closers)
	for _, room := range order {
		free <- struct{}{}
		done.Go(func() {
			for _, tm := range rooms[room] {
				_ = t.close(ctx, tm, Expired)
			}
			<-free
		})
	}
	done.Wait()
}

// close makes one attempt to close an event, and schedules the next one if it fails in passing. The error is nil if the
// room has the closing event, ErrNotFound if the timer was gone, a *DropError if it now is, and else a passing fault.
func (t *Timers) close(ctx context.Context, tm *timer, o Outcome) error {
	unlock, err := t.closings.lock(ctx, tm.event.ID)
	if err == nil {
		defer unlock()
		if s, ok := tm.event.State(); ok {
			unlock, err = t.states.lock(ctx, s)
			if err == nil {
				defer unlock()
			}
		}
	}
	if err != nil { // another attempt, or a send, took too long
		t.again(tm, err)
		return err
	}
	return t.attempt(ctx, tm, o)
}

// attempt is close under the locks.
func (t *Timers) attempt(ctx context.Context, tm *timer, o Outcome) error {
	err := t.resolveUnsure(ctx, tm)
	if err != nil {
		t.again(tm, err)
		return err
	}
	t.mu.Lock()
	gone, claim, due := tm.gone, tm.claim, tm.due
	t.mu.Unlock()
	notDue := due.After(time.Now())
	if !gone && claim == nil && (o != Expired || !notDue) {
		if err = t.confirm(ctx, tm); err != nil {
			return t.settle(ctx, tm, o, err)
		}
	}
	switch {
	case gone:
		t.removeLeftRow(ctx, tm)
		return ErrNotFound
	case claim != nil:
		failpoint.Pass(failpoint.BeforeResubmit)
		err = t.roomserver.Resubmit(ctx, tm.event, claim.Closing)
	case o == Expired && notDue:
		err = errNotDue
	default:
		err = t.roomserver.Close(ctx, tm.event, o, t.sentTime(o, due), func(ctx context.Context, c SignedEvent) error {
			return t.claim(ctx, tm, due, Claim{Outcome: o, Closing: c})
		})
	}
	return t.settle(ctx, tm, o, err)
}

// sentTime returns the time that a closing event bears. One of an event that expired bears the deadline, however long after
// it is built: where another server's newer state crosses it, the room's state resolution prefers what is later, and that
// is then whatever was sent after the deadline. It is the deadline by the wall clock as it goes now, and never before it.
func (t *Timers) sentTime(o Outcome, due time.Time) time.Time {
	if o == Expired {
		return t.clock.stored(due)
	}
	return t.clock.stored(time.Now())
}

// confirm makes sure that the event is in its room, if this process has not seen it come there.
func (t *Timers) confirm(ctx context.Context, tm *timer) error {
	t.mu.Lock()
	confirmed := tm.confirmed
	t.mu.Unlock()
	if confirmed {
		return nil
	}
	failpoint.Pass(failpoint.BeforeConfirm)
	if err := t.roomserver.Confirm(ctx, tm.event); err != nil {
		return err
	}
	failpoint.Pass(failpoint.AfterConfirm)
	t.mu.Lock()
	defer t.mu.Unlock()
	tm.confirmed, tm.unsent = true, false
	return nil
}

// claim writes into the timer's row how it ends. To be expired, the timer must be as due as it was when the closing event
// began to be built: if it was refreshed since, the event bears a time at which it was not due, even if the new deadline has
// passed as well by now.
func (t *Timers) claim(ctx context.Context, tm *timer, due time.Time, c Claim) error {
	tm.row.Lock()
	defer tm.row.Unlock()
	t.mu.Lock()
	running, deadline := tm.running(), tm.deadline
	notDue := c.Outcome == Expired && (tm.due.After(time.Now()) || !tm.due.Equal(due))
	t.mu.Unlock()
	switch {
	case !running:
		return ErrNotFound
	case notDue:
		return errNotDue
	}
	failpoint.Pass(failpoint.BeforeClaim)
	ok, err := t.store.Claim(ctx, tm.event.ID, deadline, c)
	failpoint.Pass(failpoint.AfterClaim)
	t.mu.Lock()
	defer t.mu.Unlock()
	if err != nil || !ok {
		tm.unsure = true
		if err == nil {
			return errClaimFailed
		}
		return fmt.Errorf("claiming %s: %w", tm.event.ID, err)
	}
	tm.claim = &c
	return nil
}

// resolveUnsure looks at the row of a timer of which memory does not know whether it is claimed.
func (t *Timers) resolveUnsure(ctx context.Context, tm *timer) error {
	tm.row.Lock()
	defer tm.row.Unlock()
	t.mu.Lock()
	unsure := tm.unsure
	t.mu.Unlock()
	if !unsure {
		return nil
	}
	return t.reload(ctx, tm)
}

// settle does what follows from the result of an attempt.
func (t *Timers) settle(ctx context.Context, tm *timer, o Outcome, err error) error {
	if err == nil {
		return t.closed(ctx, tm, o)
	}
	if errors.Is(err, ErrUnknownEvent) {
		t.mu.Lock()
		tm.unknown++
		neverSent := tm.unknown > neverSentAfter
		t.mu.Unlock()
		if neverSent {
			err = &DropError{Reason: NeverSent, Cause: err}
		}
	}
	if dropped := (*DropError)(nil); errors.As(err, &dropped) {
		t.gone(ctx, tm, dropped)
	} else {
		t.again(tm, err)
	}
	return err
}

// closed takes a timer out whose closing event is in the room. It returns ErrNotFound if the event was closed otherwise
// than the caller wanted: the token was invalid before he came.
func (t *Timers) closed(ctx context.Context, tm *timer, o Outcome) error {
	failpoint.Pass(failpoint.AfterClosing)
	t.mu.Lock()
	claim, late := tm.claim, time.Since(tm.due)
	t.index.remove(tm)
	t.mu.Unlock()
	t.metrics.closings.WithLabelValues(string(claim.Outcome)).Inc()
	if claim.Outcome == Expired {
		t.metrics.lateness.Observe(late.Seconds())
	}
	t.log.WithFields(logrus.Fields{
		"event_id": tm.event.ID, "room_id": tm.event.RoomID,
		"closing_event_id": claim.Closing.EventID, "outcome": claim.Outcome,
	}).Info("Closed an expiring event")
	t.removeRow(ctx, tm)
	if claim.Outcome != o {
		return ErrNotFound
	}
	return nil
}

// gone takes a timer out that gets no closing event.
func (t *Timers) gone(ctx context.Context, tm *timer, dropped *DropError) {
	t.mu.Lock()
	already := tm.gone
	t.index.remove(tm)
	t.mu.Unlock()
	if already { // dropped by somebody else meanwhile
		return
	}
	t.metrics.drops.WithLabelValues(string(dropped.Reason)).Inc()
	t.log.WithError(dropped.Cause).WithFields(logrus.Fields{
		"event_id": tm.event.ID, "room_id": tm.event.RoomID, "reason": dropped.Reason,
	}).Info("Dropped the timer of an expiring event")
	t.removeRow(ctx, tm)
}

// again schedules the next attempt after one that failed in passing.
func (t *Timers) again(tm *timer, err error) {
	if t.ctx.Err() != nil { // stopping; the next Start takes it up
		return
	}
	t.mu.Lock()
	if tm.gone {
		t.mu.Unlock()
		return
	}
	if tm.running() && !tm.unsure && (tm.due.After(time.Now()) || errors.Is(err, errNotDue)) {
		tm.failures = 0
		t.index.schedule(tm, tm.due)
		t.mu.Unlock()
		t.notify()
		return
	}
	failures := tm.failures
	t.mu.Unlock()
	t.scheduleRetry(tm)
	t.metrics.retries.Inc()
	log := t.log.WithError(err).WithFields(logrus.Fields{
		"event_id": tm.event.ID, "room_id": tm.event.RoomID, "failures": failures + 1,
	})
	if errors.Is(err, ErrUnknownEvent) || errors.Is(err, errClaimFailed) {
		log.Debug("Failed to close an expiring event, will try again")
		return
	}
	log.Warn("Failed to close an expiring event, will try again")
}
