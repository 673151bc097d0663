package expiration

import (
	"context"
	"errors"
	"fmt"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/index"
)

// LockRequest takes the lock of a request, and returns the function that gives it back. A client that repeats a request because it was
// impatient must find the result of the first one.
func (t *Timers) LockRequest(ctx context.Context, request RequestHash) (unlock func(), err error) {
	return t.requests.Lock(ctx, request)
}

// Sent returns the ID of the event that an earlier, identical request sent, or "" if there is none. It finds requests to an earlier
// process, and requests to this one for which the roomserver failed to take the event. Sent returns only after the event is in its room.
func (t *Timers) Sent(ctx context.Context, request RequestHash) (string, error) {
	number := t.tokens.names.request(request)
	t.mu.Lock()
	tm, eventID := t.index.OfRequest(number)
	t.mu.Unlock()
	if eventID != "" || tm == nil {
		return eventID, nil
	}
	// An attempt that finds the event missing at the same time would give the timer up.
	unlock, err := t.lockTimer(ctx, tm)
	if err != nil {
		return "", err
	}
	defer unlock()
	row, _, err := t.load(ctx, tm)
	if err == nil {
		err = t.confirm(ctx, tm, row.Event)
	}
	if errors.Is(err, ErrUnknownEvent) {
		err = t.sendAgain(ctx, tm, row.Event)
	}
	switch {
	case err == nil:
		return row.Event.ID, nil
	case isFinal(err):
		return "", nil
	}
	return "", fmt.Errorf("sending an event again: %w", err)
}

// sendAgain gives an event to the roomserver that does not have it, or has it in its queue.
func (t *Timers) sendAgain(ctx context.Context, tm *index.Timer, e Event) error {
	if err := t.roomserver.Resubmit(ctx, Timer{Event: e}, e.Request.Signed); err != nil {
		return err
	}
	t.noteConfirmed(tm)
	return nil
}
