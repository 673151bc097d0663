package expiration

import (
	"context"
	"errors"
	"fmt"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/index"
)

// LockRequest waits until no other request with this hash is being dealt with, and returns the function that lets the next
// one in. What a client repeats because it was impatient must find what came of it the first time.
func (t *Timers) LockRequest(ctx context.Context, request RequestHash) (unlock func(), err error) {
	return t.requests.Lock(ctx, request)
}

// Sent returns the ID of the event that was accepted from a request which is repeated now, by an earlier process, or by this
// one if the roomserver failed to take it; or "" if there is none. The event is in its room then, even if it was not before.
func (t *Timers) Sent(ctx context.Context, request RequestHash) (string, error) {
	number := t.tokens.names.request(request)
	t.mu.Lock()
	tm, eventID := t.index.OfRequest(number)
	t.mu.Unlock()
	if eventID != "" || tm == nil {
		return eventID, nil
	}
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

// sendAgain gives an event to the roomserver that it does not have, or has in its queue.
func (t *Timers) sendAgain(ctx context.Context, tm *index.Timer, e Event) error {
	if err := t.roomserver.Resubmit(ctx, Timer{Event: e}, e.Request.Signed); err != nil {
		return err
	}
	t.noteConfirmed(tm)
	return nil
}
