package expiration

import (
	"context"
	"fmt"
	"maps"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/index"
)

// inFlight is a delayed event that is claimed and not yet finalised.
type inFlight struct {
	timer         *index.Timer
	sender, rowID string
}

// noteInFlight records a claimed delayed event before the roomserver gets it. Otherwise its sender could see the event without its delay
// ID.
func (t *Timers) noteInFlight(tm *index.Timer, row Timer) {
	if row.Delayed == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.inFlight[row.Claim.Event.EventID] = inFlight{tm, row.Event.Sender, row.Event.ID}
}

// readSenders reads which users have finalised events that were sent, and forgets those who have none any more. A user who sends one
// meanwhile is not forgotten.
func (t *Timers) readSenders(ctx context.Context) error {
	t.mu.Lock()
	t.round++
	t.mu.Unlock()
	userIDs, err := t.store.FinalisedSenders(ctx)
	if err != nil {
		return err
	}
	senders := make([]uint64, len(userIDs))
	for i, userID := range userIDs {
		senders[i] = t.tokens.names.hash(userID)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, sender := range senders {
		t.senders[sender] = t.round
	}
	maps.DeleteFunc(t.senders, func(_ uint64, round int) bool { return round < t.round })
	return nil
}

// AnySent reports whether any user has delayed events that were sent and can still be looked up. It may be true for up to pruneInterval
// after the last of them was forgotten.
func (t *Timers) AnySent() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.senders)+len(t.inFlight) > 0
}

// HasSent reports the same for one user.
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

// DelayIDs returns, by event ID, the delay IDs of those events that the user sent as delayed events.
func (t *Timers) DelayIDs(ctx context.Context, userID string, eventIDs []string) (map[string]string, error) {
	// Memory is read before the database: an event leaves memory only after it is finalised in the database.
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
		return nil, fmt.Errorf("looking up delayed events: %w", err)
	}
	for eventID, rowID := range rowIDs {
		delayIDs[eventID] = t.tokens.Token(rowID)
	}
	return delayIDs, nil
}
