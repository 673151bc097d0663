package stateafter

import (
	"context"

	rstypes "github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/dendrite/syncapi/types"
	"github.com/matrix-org/gomatrixserverlib/spec"
)

// stay says how a user's membership changed between two positions. It is empty if the membership did not change.
type stay struct {
	// entered is whether the user entered the room at least once.
	entered bool
	// left is the position at which the user last left the room. It is 0 if the user never left, or has entered again since.
	left types.StreamPosition
	// last is the user's member event after the last change, or nil if there is none.
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

// mayConcern reports whether a change may have changed a user's membership. Most changes are one event that sets or replaces its own state;
// that event alone tells. A state key that is no user ID is a pseudo ID, which may be this user's.
func (c *change) mayConcern(userID string) bool {
	if len(c.added) != 1 || c.added[0] != c.eventID || len(c.removed) > 1 {
		return true
	}
	return c.member != "" && (c.member == userID || c.member[0] != '@')
}

// follow returns the stay that results from changes. own has the user's member events, by event ID, among all that were added or removed.
func follow(changes []change, own map[string]*rstypes.HeaderedEvent) (s stay) {
	known, now := false, false
	for _, c := range changes {
		went, came := first(own, c.removed), first(own, c.added)
		if went == nil && came == nil {
			continue
		}
		if !known {
			known, now = true, isJoin(went)
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
