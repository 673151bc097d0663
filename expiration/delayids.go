package expiration

import (
	"context"
	"fmt"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/index"
)

// inFlight is a delayed event that is on its way into the room.
type inFlight struct {
	timer         *index.Timer
	sender, rowID string
}

// noteInFlight notes that a delayed event is claimed, before anybody sees it.
func (t *Timers) noteInFlight(tm *index.Timer, row Timer) {
	if row.Delayed == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.inFlight[row.Claim.Event.EventID] = inFlight{tm, row.Event.Sender, row.Event.ID}
}

// AnySent reports whether anybody, and HasSent whether a user, has delayed events that were sent and can still be looked up.
func (t *Timers) AnySent() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.senders)+len(t.inFlight) > 0
}

func (t *Timers) HasSent(userID string) bool {
	sender := t.tokens.names.hash(userID)
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, ok := t.senders[sender]; ok {
		return true
	}
	for _, sent := range t.inFlight {
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
		if sent, ok := t.inFlight[eventID]; ok && sent.sender == userID {
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
