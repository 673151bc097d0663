package expiration

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
)

// errNotDue: the timer was refreshed since its closing event began to be built, or before.
var errNotDue = errors.New("the timer was refreshed")

// errClaimFailed: the row was not as it was seen, or nobody knows.
var errClaimFailed = errors.New("the timer could not be claimed")

// written reports whether a claim that failed may have been written all the same.
func written(err error) bool {
	return !errors.Is(err, errNotDue) && !errors.Is(err, errClaimFailed) && !errors.Is(err, ErrNotFound)
}

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
			t.lanes.add(r, tm.room, tm.due)
		}
		if tm.refused {
			t.index.forgetToken(r)
		}
	}
	return pollInterval
}

// closeDue is what a worker does with a timer. When many run out at once, nobody waits for the rows to be deleted.
func (t *Timers) closeDue(r ref, w *turn) {
	ctx, cancel := context.WithTimeout(t.ctx, attemptTimeout)
	defer cancel()
	// close schedules the next attempt and has said what there is to say.
	_ = t.close(ctx, r, Expired, w)
	t.removeRowBehind(r)
}

// recover finishes what an earlier process claimed, and in the same rooms what comes before that: room by room in the order of the
// deadlines, several rooms at once. What fails is tried again later, like any other closing.
func (t *Timers) recover(claimed []ref) {
	ctx, cancel := context.WithTimeout(t.ctx, recoverTimeout)
	defer cancel()
	rooms := map[uint64][]ref{}
	var order []uint64
	for _, r := range t.withEarlier(claimed) {
		if _, ok := rooms[r.room]; !ok {
			order = append(order, r.room)
		}
		rooms[r.room] = append(rooms[r.room], r.ref)
	}
	var done sync.WaitGroup
	free := make(chan struct{}, closers)
	for _, room := range order {
		free <- struct{}{}
		done.Go(func() {
			for _, r := range rooms[room] {
				_ = t.closeNow(ctx, r, Expired)
			}
			<-free
		})
	}
	done.Wait()
}

// overdue is a timer that is to be closed.
type overdue struct {
	ref
	room uint64
	due  time.Duration
}

// withEarlier returns timers that are claimed, and those of the same rooms that are not and should have been before: the attempt to
// close them had failed in passing. All are in the order of their deadlines.
func (t *Timers) withEarlier(claimed []ref) (all []overdue) {
	if len(claimed) == 0 {
		return nil
	}
	now, last := t.clock.now(), map[uint64]time.Duration{}
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, r := range claimed {
		tm := t.index.at(r)
		all = append(all, overdue{r, tm.room, tm.due})
		if before, ok := last[tm.room]; !ok || tm.due > before {
			last[tm.room] = tm.due
		}
	}
	for s, tm := range t.index.timers.all() {
		if before, ok := last[tm.room]; ok && tm.running() && tm.due <= now && tm.due < before {
			all = append(all, overdue{ref{s, tm.nid}, tm.room, tm.due})
		}
	}
	slices.SortFunc(all, func(a, b overdue) int { return cmp.Compare(a.due, b.due) })
	return all
}

// closeNow is close, and deletes the row if the timer is gone then.
func (t *Timers) closeNow(ctx context.Context, r ref, o Outcome) error {
	defer t.removeRow(ctx, r)
	return t.close(ctx, r, o, nil)
}

// close makes one attempt to close an event, and schedules the next one if it fails in passing. The error is nil if the
// room has the closing event, ErrNotFound if the timer was gone, a *DropError if it now is, and else a passing fault. If the
// timer is gone, removeRow is still to be called.
func (t *Timers) close(ctx context.Context, r ref, o Outcome, w *turn) error {
	var state uint64
	t.mu.Lock()
	if tm := t.index.at(r); tm != nil {
		state = tm.state
	}
	t.mu.Unlock()
	unlock, err := t.closings.lock(ctx, r.nid)
	if err == nil {
		defer unlock()
		if state != 0 {
			unlock, err = t.states.lock(ctx, state)
			if err == nil {
				defer unlock()
			}
		}
	}
	if err != nil { // another attempt, or a send, took too long
		t.again(r, Event{}, err)
		return err
	}
	return t.attempt(ctx, r, o, w)
}

// attempt is close under the locks.
func (t *Timers) attempt(ctx context.Context, r ref, o Outcome, w *turn) error {
	row, due, err := t.load(ctx, r)
	switch {
	case errors.Is(err, ErrNotFound):
		return err
	case err != nil:
		t.again(r, Event{}, err)
		return err
	}
	notDue := due > t.clock.now()
	if row.Delayed == nil && row.Claim == nil && (o != Expired || !notDue) {
		if err = t.confirm(ctx, r, row.Event); err != nil {
			return t.settle(ctx, r, row, o, err)
		}
	}
	switch {
	case row.Claim != nil:
		t.noteClaimed(r, row)
		failpoint.Pass(failpoint.BeforeResubmit)
		if err = w.follow(ctx, row.Claim.Event, false); err == nil {
			err = t.roomserver.Resubmit(ctx, row, row.Claim.Event)
		}
	case o == Expired && notDue:
		if err = errNotDue; t.isDoubtful(r) {
			err = cmp.Or(t.dropDoubtful(ctx, r, row), err)
		}
	case row.Delayed != nil:
		err = t.sendDelayed(ctx, r, &row, o, due, w)
	default:
		claim := func(ctx context.Context, closing SignedEvent) error {
			c := Claim{Outcome: o, Event: closing}
			if err := t.claim(ctx, r, due, c); err != nil {
				return err
			}
			row.Claim = &c
			return w.follow(ctx, closing, !row.Event.decides())
		}
		err = t.roomserver.Close(ctx, row.Event, o, t.sentTime(o, due), t.isLost(r), claim)
	}
	return t.settle(ctx, r, row, o, err)
}

// sentTime returns the time that a closing event bears. One of an event that expired bears the deadline, however long after
// it is built: where another server's newer state crosses it, the room's state resolution prefers what is later, and that
// is then whatever was sent after the deadline. It is the deadline by the wall clock as it goes now, and never before it.
func (t *Timers) sentTime(o Outcome, due time.Duration) time.Time {
	if o == Expired {
		return t.clock.stored(due)
	}
	return t.clock.stored(t.clock.now())
}

// confirm makes sure that the event is in its room, if this process has not seen it come there.
func (t *Timers) confirm(ctx context.Context, r ref, e Event) error {
	t.mu.Lock()
	tm := t.index.at(r)
	confirmed := tm != nil && tm.confirmed
	t.mu.Unlock()
	if confirmed {
		return nil
	}
	failpoint.Pass(failpoint.BeforeConfirm)
	if err := t.roomserver.Confirm(ctx, e); err != nil {
		return err
	}
	failpoint.Pass(failpoint.AfterConfirm)
	t.confirmed(r)
	return nil
}

// claim writes into the timer's row how it ends. To be expired, the timer must be as due as it was when the closing event
// began to be built: if it was refreshed since, the event bears a time at which it was not due, even if the new deadline has
// passed as well by now. Where there is nothing to be sent again, because the room has the event already, only memory is told.
func (t *Timers) claim(ctx context.Context, r ref, due time.Duration, c Claim) error {
	defer t.lockRow(r)()
	t.mu.Lock()
	tm := t.index.at(r)
	if !tm.running() {
		t.mu.Unlock()
		return ErrNotFound
	}
	deadline := time.UnixMilli(tm.deadline)
	notDue := c.Outcome == Expired && (tm.due > t.clock.now() || tm.due != due)
	t.mu.Unlock()
	if notDue {
		return errNotDue
	}
	failpoint.Pass(failpoint.BeforeClaim)
	ok, err := true, error(nil)
	if c.Event.PDU != nil {
		ok, err = t.claims.do(ctx, ConditionalClaim{NID: r.nid, Deadline: deadline, Claim: c})
	}
	failpoint.Pass(failpoint.AfterClaim)
	t.mu.Lock()
	defer t.mu.Unlock()
	if err != nil || !ok {
		tm.unsure = true
		if err == nil {
			return errClaimFailed
		}
		return fmt.Errorf("claiming a timer: %w", err)
	}
	tm.claimed = true
	return nil
}

// settle does what follows from the result of an attempt.
func (t *Timers) settle(ctx context.Context, r ref, row Timer, o Outcome, err error) error {
	if err == nil {
		return t.closed(ctx, r, row, o)
	}
	if isAwaited(err) {
		err = t.await(ctx, r, row.Event, o, err)
	}
	if dropped := (*DropError)(nil); errors.As(err, &dropped) {
		err = t.gone(ctx, r, row, dropped)
	} else {
		t.again(r, row.Event, err)
	}
	return err
}

// isAwaited reports whether an attempt failed because the roomserver has not yet got so far as it was before a crash.
func isAwaited(err error) bool { return errors.Is(err, ErrUnknownEvent) || errors.Is(err, ErrSetBack) }

// await counts how many times in a row the roomserver had not got so far when a timer was due, and sees to it that it goes on. It
// returns the error, or a *DropError if the roomserver has been waited for long enough.
func (t *Timers) await(ctx context.Context, r ref, e Event, o Outcome, err error) error {
	unsent := errors.Is(err, ErrUnknownEvent)
	t.mu.Lock()
	givenUp := false
	if tm := t.index.at(r); tm != nil {
		if o == Expired { // not those who ask as often as they like
			tm.awaited = min(tm.awaited+1, givenUpAfter+1)
		}
		tm.unsent = unsent
		givenUp = unsent && tm.awaited > givenUpAfter
	}
	t.mu.Unlock()
	if givenUp {
		return &DropError{Reason: NeverSent, Cause: err}
	}
	if failed := t.roomserver.Wake(ctx, e.RoomID); failed != nil { // so does the next attempt
		t.log.WithError(failed).WithField("room_id", e.RoomID).Debug("Failed to wake the roomserver's worker for a room")
	}
	return err
}

// isLost reports whether the roomserver was waited for long enough to bring an event back that is no longer the current state:
// nothing that could do so is left in its queue. In the room's graph, and for other servers, it stands there all the same.
func (t *Timers) isLost(r ref) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	tm := t.index.at(r)
	return tm != nil && (tm.awaited > lostAfter || tm.awaited > 0 && failpoint.Fail(failpoint.Awaiting) != nil)
}

// closed takes a timer out whose event is in the room. It returns ErrNotFound if the event was closed otherwise
// than the caller wanted: the token was invalid before he came.
func (t *Timers) closed(ctx context.Context, r ref, row Timer, o Outcome) error {
	failpoint.Pass(failpoint.AfterClosing)
	var late time.Duration
	t.mu.Lock()
	if tm := t.index.at(r); tm != nil {
		late = t.clock.now() - tm.due
	}
	if row.Delayed == nil {
		t.index.answer(r, row.Event.ID)
		t.index.remove(r)
	}
	t.mu.Unlock()
	if row.Claim.Outcome == Expired {
		t.metrics.lateness.Observe(late.Seconds())
	}
	if row.Delayed != nil {
		if err := t.sent(ctx, r, row); err != nil {
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

// gone takes a timer out whose event will never be sent, and returns the reason, or a passing fault if it could not.
func (t *Timers) gone(ctx context.Context, r ref, row Timer, dropped *DropError) error {
	if row.Delayed != nil {
		if err := t.finalise(ctx, r, finalOf(dropped), false); err != nil {
			t.again(r, row.Event, err)
			return err
		}
		return dropped
	}
	t.mu.Lock()
	tm := t.index.at(r)
	already := tm == nil || tm.gone
	if dropped.Reason == Redacted {
		t.index.answer(r, row.Event.ID)
	}
	t.index.remove(r)
	t.mu.Unlock()
	if already { // dropped by somebody else meanwhile
		return dropped
	}
	t.metrics.drops.WithLabelValues(string(dropped.Reason)).Inc()
	t.log.WithError(dropped.Cause).WithFields(logrus.Fields{
		"event_id": row.Event.ID, "room_id": row.Event.RoomID, "reason": dropped.Reason,
	}).Info("Dropped the timer of an expiring event")
	return dropped
}

// again schedules the next attempt after one that failed in passing. The event is empty if its row could not be read.
func (t *Timers) again(r ref, e Event, err error) {
	if t.ctx.Err() != nil { // stopping; the next Start takes it up
		return
	}
	t.mu.Lock()
	tm := t.index.at(r)
	if tm == nil || tm.gone {
		t.mu.Unlock()
		return
	}
	if tm.running() && !tm.unsure && !tm.doubtful && (tm.due > t.clock.now() || errors.Is(err, errNotDue)) {
		tm.failures = 0
		t.index.schedule(r, tm.due)
		t.mu.Unlock()
		t.notify()
		return
	}
	t.mu.Unlock()
	failures := t.scheduleRetry(r)
	t.metrics.retries.Inc()
	log := t.log.WithError(err).WithFields(logrus.Fields{
		"timer_nid": r.nid, "event_id": e.ID, "room_id": e.RoomID, "failures": failures,
	})
	if isAwaited(err) || errors.Is(err, errClaimFailed) {
		log.Debug("Failed to close an expiring event, will try again")
		return
	}
	log.Warn("Failed to close an expiring event, will try again")
}
