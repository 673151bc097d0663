package syncapi

import (
	"context"

	rstypes "github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/dendrite/syncapi/types"
	"github.com/matrix-org/gomatrixserverlib/spec"
)

// stay is what became of a user's membership between two positions.
type stay struct {
	// joined is whether the user was in the room at the beginning.
	joined bool
	// entered is whether the user came in.
	entered bool
	// left is the position at which the user went out for the last time, or 0 if it was in the room at the end.
	left types.StreamPosition
	// last is the last member event, or nil if the membership did not change.
	last *rstypes.HeaderedEvent
}

// stay follows a user's membership through changes.
func (r *record) stay(ctx context.Context, roomID string, userID string, changes []change) (s stay, err error) {
	var ids []string
	for _, c := range changes {
		// Most changes are one event that takes the place of another of its kind.
		if len(c.added) == 1 && c.added[0] == c.event.EventID() && r.memberOf(ctx, c.event) != userID {
			continue
		}
		ids = append(append(ids, c.added...), c.removed...)
	}
	events, err := r.events(ctx, roomID, ids, nil)
	if err != nil {
		return stay{}, err
	}
	own := map[string]*rstypes.HeaderedEvent{}
	for _, event := range events {
		if r.memberOf(ctx, event) == userID {
			own[event.EventID()] = event
		}
	}
	return follow(changes, own), nil
}

// follow is stay, given the user's member events among those that came or went.
func follow(changes []change, own map[string]*rstypes.HeaderedEvent) (s stay) {
	known, now := false, false
	for _, c := range changes {
		went, came := first(own, c.removed), first(own, c.added)
		if went == nil && came == nil {
			continue
		}
		if !known {
			known, now = true, isJoin(went)
			s.joined = now
		}
		switch next := isJoin(came); {
		case next && !now:
			s.entered, s.left = true, 0
		case now && !next:
			s.left = c.position
		}
		now, s.last = isJoin(came), came
	}
	return s
}

func first(own map[string]*rstypes.HeaderedEvent, eventIDs []string) *rstypes.HeaderedEvent {
	for _, eventID := range eventIDs {
		if event := own[eventID]; event != nil {
			return event
		}
	}
	return nil
}

func isJoin(event *rstypes.HeaderedEvent) bool {
	if event == nil {
		return false
	}
	membership, err := event.Membership()
	return err == nil && membership == spec.Join
}
