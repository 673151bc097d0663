package stateafter

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

// stay follows a user's membership through the changes between two positions.
func (r *record) stay(ctx context.Context, roomID string, userID string, from, to types.StreamPosition) (s stay, err error) {
	var (
		changes []change
		ids     []string
	)
	if err = r.changes(ctx, []string{roomID}, from, to, oldestFirst, func(c change) {
		if c.mayConcern(userID) {
			changes = append(changes, c)
			ids = append(append(ids, c.added...), c.removed...)
		}
	}); err != nil {
		return stay{}, err
	}
	events, err := r.events(ctx, roomID, ids)
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

// mayConcern reports whether a change may be one of a user's membership. Most are one event that takes the place of another of its
// kind, and so are known by that event. The state keys of some rooms are no user IDs.
func (c *change) mayConcern(userID string) bool {
	if len(c.added) != 1 || c.added[0] != c.eventID || len(c.removed) > 1 {
		return true
	}
	return c.member != "" && (c.member == userID || c.member[0] != '@')
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
