package expiration

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/batch"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/lanes"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
)

// Delayed is what a timer sends if it is not the closing event of an event in the room, but one that a client wants sent
// later (MSC4140 as accepted). The timer's Event says where to; its ID is the row's own then, from which the delay ID is
// derived as a refresh token is from the ID of an event.
type Delayed struct {
	// Content is a JSON object, as the client wrote it.
	Content []byte
	// Expires is for how long the event is to run once it is sent, as its content says, or 0.
	Expires time.Duration
	// Timestamp is the time that the event is to bear, as an application service may say, or zero. It has whole milliseconds,
	// and is not before 1970, of which the first moment is a time like others.
	Timestamp time.Time
	// Exempt says that the limit of running timers does not hold for the sender. Schedule sets it.
	Exempt bool
	// Over is the event that was the current state when this one was scheduled, or "".
	Over string
}

// Final says what became of a delayed event. At most one of EventID and Error is set; neither is if it was cancelled.
type Final struct {
	At      time.Time // in whole milliseconds
	EventID string
	// Error is the Matrix error with which the event was refused.
	Error json.RawMessage
}

// Sent and Cancelled report what the event came to.
func (f Final) Sent() bool      { return f.EventID != "" }
func (f Final) Cancelled() bool { return f.EventID == "" && f.Error == nil }

// DelayedEvent is a delayed event as its owner sees it.
type DelayedEvent struct {
	DelayID string
	Timer   Timer
	// Final is nil while the event is scheduled.
	Final *Final
	// Place is where the event stands in the list of its owner's, or "" outside of it.
	Place string
}

// ScheduledAt returns when the delay began: when the event was scheduled, or restarted last.
func (d DelayedEvent) ScheduledAt() time.Time { return d.Timer.Deadline.Add(-d.Timer.Duration) }

// FinalisedError is the error of Restart, Send and Cancel for a delayed event that is no longer scheduled.
type FinalisedError struct{ Final Final }

func (e *FinalisedError) Error() string { return "the delayed event was finalised already" }

// RefusedError is how the homeserver refuses a send, for good: what a client would have been answered.
type RefusedError struct {
	Code int
	// Response is the Matrix error.
	Response json.RawMessage
}

func (e *RefusedError) Error() string { return fmt.Sprintf("HTTP %d: %s", e.Code, e.Response) }

// errLeftOver: a request that is repeated has left a row behind that cannot be deleted just now.
var errLeftOver = errors.New("the request failed before, and what it left cannot be deleted")

// pruneInterval is how often finalised events are forgotten that have been kept for long enough.
const pruneInterval = time.Hour

// sentDelayed is a delayed event that is on its way into the room.
type sentDelayed struct {
	timer         ref
	sender, rowID string
}

// Schedule stores an event that is to be sent after a delay, which must be positive, and returns its delay ID. A request that
// is repeated gets the one that it was given first, whatever has become of it since. The error is a *LimitError if the user,
// unless exempt, has as many events scheduled as are allowed.
func (t *Timers) Schedule(ctx context.Context, e Event, d Delayed, delay time.Duration, exempt bool) (delayID string, err error) {
	if e.Request != nil {
		unlock, err := t.LockRequest(ctx, e.Request.Hash)
		if err != nil {
			return "", err
		}
		defer unlock()
		if delayID, err = t.scheduled(ctx, e.Request.Hash); err != nil || delayID != "" {
			return delayID, err
		}
	}
	if s, ok := e.State(); ok {
		// What comes after this is seen to be newer than what the event was scheduled over.
		unlock, err := t.LockState(ctx, s)
		if err != nil {
			return "", err
		}
		defer unlock()
		if d.Over, err = t.roomserver.CurrentState(ctx, s); err != nil {
			return "", err
		}
	}
	d.Exempt = exempt
	var id [32]byte
	_, _ = rand.Read(id[:]) // never fails
	e.ID = base64.RawURLEncoding.EncodeToString(id[:])
	r, _, err := t.insert(ctx, Timer{Event: e, Delayed: &d, Duration: delay}, exempt)
	if err != nil {
		return "", err
	}
	t.mu.Lock()
	if tm := t.index.at(r); tm.running() { // else somebody who had found it has sent or finalised it
		t.activate(r, tm)
	}
	t.mu.Unlock()
	return t.tokens.Token(e.ID), nil
}

// Scheduled returns the delay ID that a request was given which is repeated now, or "". If the first is being dealt with, it is
// waited for: its row may be there, and yet be taken back.
func (t *Timers) Scheduled(ctx context.Context, request RequestHash) (delayID string, err error) {
	unlock, err := t.LockRequest(ctx, request)
	if err != nil {
		return "", err
	}
	defer unlock()
	return t.scheduled(ctx, request)
}

// scheduled is Scheduled under the request's lock.
func (t *Timers) scheduled(ctx context.Context, request RequestHash) (delayID string, err error) {
	for sure := false; ; sure = true {
		rowID, err := t.store.Requested(ctx, request)
		switch {
		case errors.Is(err, ErrNotFound):
			return "", nil
		case err != nil:
			return "", fmt.Errorf("looking for a request: %w", err)
		}
		delayID = t.tokens.Token(rowID)
		h := HashToken(delayID)
		switch r := t.leftOver(h); {
		case r != ref{}:
			t.removeRow(ctx, r)
			if t.leftOver(h) != (ref{}) {
				return "", errLeftOver
			}
			return "", nil
		case sure || t.find(h, true) != ref{}:
			return delayID, nil
		}
		// It was finalised; or it was left over and is deleted since it was looked for, then it is not found again.
	}
}

// leftOver returns the timer of a delayed event that was written although writing it failed, and is not yet deleted again.
func (t *Timers) leftOver(h TokenHash) ref {
	t.mu.Lock()
	defer t.mu.Unlock()
	for r := range t.index.left {
		if t.index.at(r).token == [tokenPrefix]byte(h[:tokenPrefix]) {
			return r
		}
	}
	return ref{}
}

// AllowDelayed is Allow for delay IDs. They are known as long as their events are scheduled.
func (t *Timers) AllowDelayed(delayID string) (known bool, wait time.Duration) {
	return t.allow(HashToken(delayID), true)
}

// RestartDelayed begins the delay of a scheduled event anew. The owner is "" if the delay ID is authority enough. The error is
// ErrNotFound if there is no such event, of this owner, and a *FinalisedError if it is no longer scheduled.
func (t *Timers) RestartDelayed(ctx context.Context, delayID, owner string) error {
	r, err := t.delayed(delayID, owner)
	if err == nil {
		err = t.refresh(ctx, r, 0)
	}
	return t.finalised(ctx, delayID, owner, err)
}

// SendDelayed sends a scheduled event now. The error is that of RestartDelayed, or a *RefusedError if the event was refused,
// or a passing fault; it stays scheduled then. It is a *DropError if the event was given to its room and did not come into it, or
// cannot be sent at all.
func (t *Timers) SendDelayed(ctx context.Context, delayID, owner string) error {
	r, err := t.delayed(delayID, owner)
	if err == nil {
		err = t.endNow(ctx, r)
	}
	return t.finalised(ctx, delayID, owner, err)
}

// CancelDelayed takes a scheduled event back. The error is that of RestartDelayed.
func (t *Timers) CancelDelayed(ctx context.Context, delayID, owner string) error {
	r, err := t.delayed(delayID, owner)
	if err == nil {
		err = t.cancel(ctx, r)
	}
	return t.finalised(ctx, delayID, owner, err)
}

// delayed returns the timer of a delayed event that is scheduled, or being sent.
func (t *Timers) delayed(delayID, owner string) (ref, error) {
	r, sender := t.find(HashToken(delayID), true), t.tokens.names.hash(owner)
	t.mu.Lock()
	defer t.mu.Unlock()
	if tm := t.index.at(r); tm == nil || owner != "" && tm.sender != sender {
		return ref{}, ErrNotFound
	}
	return r, nil
}

// finalised replaces ErrNotFound by what has become of the event, if it was ever there.
func (t *Timers) finalised(ctx context.Context, delayID, owner string, err error) error {
	var dropped *DropError
	if !errors.Is(err, ErrNotFound) && !errors.As(err, &dropped) || dropped.isRefusal() {
		return err
	}
	d, err := t.DelayedEvent(ctx, delayID, owner)
	switch {
	case err != nil:
		return err
	case d.Final == nil:
		return ErrNotFound
	}
	return &FinalisedError{*d.Final}
}

// finalise writes what became of a delayed event, and takes its timer out when that is written; if running is set, only if it
// is still scheduled, and else the error is ErrNotFound. After another error the timer stays, and what is written is found out
// when it is looked at next.
func (t *Timers) finalise(ctx context.Context, r ref, f Final, running bool) error {
	unlock, err := t.lockRow(ctx, r)
	if err != nil {
		return err
	}
	defer unlock()
	return t.finaliseLocked(ctx, r, f, running)
}

// cancel takes a scheduled event back for a caller who can hang up until writing begins, and not after that.
func (t *Timers) cancel(ctx context.Context, r ref) error {
	unlock, err := t.lockRow(ctx, r)
	if err != nil {
		return err
	}
	defer unlock()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), batch.Timeout)
	defer cancel()
	return t.finaliseLocked(ctx, r, Final{}, true)
}

// finaliseLocked is finalise under the row's lock.
func (t *Timers) finaliseLocked(ctx context.Context, r ref, f Final, running bool) error {
	t.mu.Lock()
	tm := t.index.at(r)
	if tm == nil || tm.gone || running && tm.claimed {
		t.mu.Unlock()
		return ErrNotFound
	}
	t.mu.Unlock()
	f.At = t.clock.stored(t.clock.now())
	done, err := t.store.Finalise(ctx, r.nid, f, running, t.cfg.MaxFinalisedPerUser)
	failpoint.Pass(failpoint.AfterDelete)
	if err == nil && !done {
		if _, _, err = t.loadLocked(ctx, r); err == nil {
			err = ErrNotFound
		}
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if err != nil {
		tm.unsure = true
		t.metrics.errors.WithLabelValues("finalise").Inc()
		return fmt.Errorf("finalising a delayed event: %w", err)
	}
	t.metrics.finalised.WithLabelValues(f.result()).Inc()
	if f.Sent() {
		t.senders[tm.sender] = struct{}{}
	}
	t.forgetClaimed(r)
	t.index.remove(r)
	t.index.forgetRow(r)
	return nil
}

// forgetClaimed is called when a delayed event is finalised. Timers.mu is held.
func (t *Timers) forgetClaimed(r ref) {
	maps.DeleteFunc(t.claimed, func(_ string, sent sentDelayed) bool { return sent.timer == r })
}

// sent is what remains to be done for a delayed event that is in its room.
func (t *Timers) sent(ctx context.Context, r ref, row Timer) error {
	err := t.finalise(ctx, r, Final{EventID: row.Claim.Event.EventID}, false)
	if err != nil {
		t.again(r, row.Event, err)
		return err
	}
	t.log.WithFields(logrus.Fields{
		"event_id": row.Claim.Event.EventID, "room_id": row.Event.RoomID, "outcome": row.Claim.Outcome,
	}).Info("Sent a delayed event")
	return nil
}

// dropDelayed finalises a scheduled event that will not be sent. If that fails, it is seen again when it is due.
func (t *Timers) dropDelayed(ctx context.Context, r ref, reason DropReason) {
	if err := t.finalise(ctx, r, finalOf(&DropError{Reason: reason}), true); err != nil && !isFinal(err) {
		t.log.WithError(err).WithField("timer_nid", r.nid).Error("Failed to cancel a delayed event")
	}
}

func (t *Timers) isDelayed(r ref) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	tm := t.index.at(r)
	return tm != nil && tm.delayed
}

// result is what the metrics call it.
func (f Final) result() string {
	switch {
	case f.Sent():
		return "sent"
	case f.Cancelled():
		return "cancelled"
	}
	return "error"
}

// sendDelayed is what closing is for a delayed event.
func (t *Timers) sendDelayed(ctx context.Context, r ref, row *Timer, o Outcome, due time.Duration, w *lanes.Turn) error {
	if row.Event.StateKey != nil {
		replaced, err := t.roomserver.Replaced(ctx, *row)
		if err != nil {
			return err
		}
		if replaced {
			return &DropError{Reason: Replaced}
		}
	}
	var pending *Pending
	sent := false
	defer func() { // also after a panic
		if pending != nil {
			pending.Activate(sent)
		}
	}()
	eventID, err := t.roomserver.Send(ctx, *row, o, func(ctx context.Context, b Built) (err error) {
		if row.Event.StateKey != nil { // a send that went past this one may have come meanwhile, see LockState
			if replaced, err := t.roomserver.Replaced(ctx, *row); err != nil || replaced {
				return cmp.Or(err, error(&DropError{Reason: Replaced}))
			}
		}
		if row.Delayed.Expires > 0 {
			e := Event{ID: b.EventID, RoomID: b.RoomID, Type: b.Type, StateKey: b.StateKey, Sender: row.Event.Sender}
			if !b.Closable {
				return &RefusedError{Code: 413, Response: tooLarge}
			}
			if pending, err = t.Begin(ctx, e, row.Delayed.Expires, row.Delayed.Exempt); err != nil {
				return err
			}
		}
		c := Claim{Outcome: o, Event: b.Signed()}
		if err = t.claim(ctx, r, due, c); err != nil {
			if pending != nil && !pending.existed && !written(err) {
				ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), batch.Timeout)
				defer cancel()
				t.drop(ctx, pending.timer, NeverSent)
			}
			return err
		}
		row.Claim = &c
		t.noteClaimed(r, *row)
		return follow(ctx, w, c.Event, !row.Event.decides())
	})
	sent = err == nil
	if err == nil && row.Claim == nil { // the room has the same state already, and gets no event
		row.Claim = &Claim{Outcome: o, Event: SignedEvent{EventID: eventID}}
		err = t.claim(ctx, r, due, *row.Claim)
	}
	if o == Expired { // and nobody waits for the answer
		if errors.As(err, new(*LimitError)) {
			err = &RefusedError{Code: 429, Response: tooMany}
		}
		if errors.As(err, new(*RefusedError)) {
			return &DropError{Reason: Forbidden, Cause: err}
		}
	}
	return err
}

// noteClaimed notes that a delayed event is claimed, before anybody sees it.
func (t *Timers) noteClaimed(r ref, row Timer) {
	if row.Delayed == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.claimed[row.Claim.Event.EventID] = sentDelayed{r, row.Event.Sender, row.Event.ID}
}

// What an event with a duration is refused with when it is due.
var (
	tooLarge = json.RawMessage(`{"errcode":"M_TOO_LARGE","error":"The closing event would be too large"}`)
	tooMany  = json.RawMessage(`{"errcode":"M_LIMIT_EXCEEDED","error":"Too many of your events are running"}`)
)

// finalOf returns what becomes of a delayed event that will never be sent.
func finalOf(dropped *DropError) (f Final) {
	var refused *RefusedError
	switch {
	case dropped.Reason == Replaced, dropped.Reason == Deactivated: // which cancels it
	case errors.As(dropped, &refused):
		f.Error = refused.Response
	case dropped.Reason == Unsendable, dropped.Reason == Unanswered:
		f.Error = json.RawMessage(`{"errcode":"M_UNKNOWN","error":"The homeserver was not able to send this event"}`)
	case dropped.Reason == RoomGone:
		f.Error = json.RawMessage(`{"errcode":"M_NOT_FOUND","error":"The room is gone"}`)
	default:
		f.Error = json.RawMessage(`{"errcode":"M_FORBIDDEN","error":"The sender may no longer send this event"}`)
	}
	return f
}

// DelayedEvents yields what a user has scheduled, in the order of the due times, from behind a place in this order; "" is its
// beginning. Each event is read when it is its turn. The sequence ends with the first error.
func (t *Timers) DelayedEvents(ctx context.Context, owner, after string) iter.Seq2[DelayedEvent, error] {
	return func(yield func(DelayedEvent, error) bool) {
		for _, l := range t.listed(owner, after) {
			row, _, err := t.load(ctx, l.timer)
			switch {
			case errors.Is(err, ErrNotFound) || err == nil && row.Claim != nil:
				continue
			case err != nil:
				yield(DelayedEvent{}, err)
				return
			}
			if !yield(DelayedEvent{DelayID: t.tokens.Token(row.Event.ID), Timer: row, Place: l.place}, nil) {
				return
			}
		}
	}
}

// listed is a delayed event in a list.
type listed struct {
	timer ref
	place string
}

// listed returns what a user has scheduled, in the order of the places.
func (t *Timers) listed(owner, after string) (list []listed) {
	sender := t.tokens.names.hash(owner)
	t.mu.Lock()
	t.index.ofSender(sender, func(r ref, tm *timer) {
		if !tm.delayed || !tm.running() {
			return
		}
		// What is due in the same millisecond is told apart by the delay ID.
		if place := fmt.Sprintf("%016x%x", tm.deadline, tm.token); place > after {
			list = append(list, listed{r, place})
		}
	})
	t.mu.Unlock()
	slices.SortFunc(list, func(a, b listed) int { return cmp.Compare(a.place, b.place) })
	return list
}

// DelayedEvent returns one delayed event, of this owner if he is not "", scheduled or finalised, or ErrNotFound.
func (t *Timers) DelayedEvent(ctx context.Context, delayID, owner string) (DelayedEvent, error) {
	r, err := t.delayed(delayID, owner)
	if err == nil {
		row, _, err := t.load(ctx, r)
		switch {
		case err == nil && row.Claim == nil:
			return DelayedEvent{DelayID: delayID, Timer: row}, nil
		case err == nil:
			return DelayedEvent{DelayID: delayID, Timer: row, Final: &Final{
				At: t.clock.stored(t.clock.now()), EventID: row.Claim.Event.EventID,
			}}, nil
		case !errors.Is(err, ErrNotFound):
			return DelayedEvent{}, err
		}
	}
	d, err := t.store.Finalised(ctx, HashToken(delayID))
	switch {
	case errors.Is(err, ErrNotFound) || err == nil && owner != "" && owner != d.Timer.Event.Sender:
		return DelayedEvent{}, ErrNotFound
	case err != nil:
		return DelayedEvent{}, fmt.Errorf("looking for a finalised event: %w", err)
	}
	d.DelayID = delayID
	return d, nil
}

// AnySent reports whether anybody, and HasSent whether a user, has delayed events that were sent and can still be looked up.
func (t *Timers) AnySent() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.senders)+len(t.claimed) > 0
}

func (t *Timers) HasSent(userID string) bool {
	sender := t.tokens.names.hash(userID)
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, ok := t.senders[sender]; ok {
		return true
	}
	for _, sent := range t.claimed {
		if sent.sender == userID {
			return true
		}
	}
	return false
}

// DelayIDs returns the delay IDs of those of the events that the user sent as delayed events, by event ID.
func (t *Timers) DelayIDs(ctx context.Context, userID string, eventIDs []string) (map[string]string, error) {
	// An event is claimed before anybody sees it, and finalised before it is forgotten here.
	delayIDs := map[string]string{}
	t.mu.Lock()
	for _, eventID := range eventIDs {
		if sent, ok := t.claimed[eventID]; ok && sent.sender == userID {
			delayIDs[eventID] = t.tokens.Token(sent.rowID)
		}
	}
	t.mu.Unlock()
	rowIDs, err := t.store.FinalisedAs(ctx, userID, eventIDs)
	if err != nil {
		return nil, fmt.Errorf("looking for delayed events: %w", err)
	}
	for eventID, rowID := range rowIDs {
		delayIDs[eventID] = t.tokens.Token(rowID)
	}
	return delayIDs, nil
}

// loadSenders reads who has delayed events that were sent. Nobody may be finalising one.
func (t *Timers) loadSenders(ctx context.Context) error {
	userIDs, err := t.store.FinalisedSenders(ctx)
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.senders = make(map[uint64]struct{}, len(userIDs))
	for _, userID := range userIDs {
		t.senders[t.tokens.names.hash(userID)] = struct{}{}
	}
	return nil
}

// prune forgets finalised events that were kept for long enough, from time to time.
func (t *Timers) prune() {
	ticker := time.NewTicker(pruneInterval)
	defer ticker.Stop()
	for {
		err := t.store.Prune(t.ctx, t.clock.stored(t.clock.now()).Add(-t.cfg.KeepFinalised))
		if err != nil && t.ctx.Err() == nil {
			t.metrics.errors.WithLabelValues("prune").Inc()
			t.log.WithError(err).Error("Failed to forget finalised events")
		}
		select {
		case <-t.ctx.Done():
			return
		case <-ticker.C:
		}
	}
}
