package roomserver

import (
	"context"
	"slices"

	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/gomatrixserverlib"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// ground is the state event under a closing event: the one with the same type and state key, in the state after the closing event's prev
// events. One answer of the roomserver has both the prev events and this state, so they match.
type ground struct {
	state gomatrixserverlib.StateKeyTuple
	// asked: Dendrite has queried the prev events. current is nil before that, and if the room has no such state.
	asked   bool
	current gomatrixserverlib.PDU
}

// newGround returns the ground of the closing event of e, or nil if e is not state.
func newGround(e expiration.Event) *ground {
	s, ok := e.State()
	if !ok {
		return nil
	}
	return &ground{state: gomatrixserverlib.StateKeyTuple{EventType: s.Type, StateKey: s.Key}}
}

// QueryLatestEventsAndState implements api.QueryLatestEventsAndStateAPI. Dendrite calls it for the prev events of an event that it builds.
// The ground's state is added to the query, and removed from the answer if Dendrite did not ask for it.
func (s *oneSend) QueryLatestEventsAndState(
	ctx context.Context, req *api.QueryLatestEventsAndStateRequest, res *api.QueryLatestEventsAndStateResponse,
) error {
	g, more := s.ground, *req
	needed := g == nil || slices.Contains(req.StateToFetch, g.state)
	if !needed {
		more.StateToFetch = append(slices.Clip(req.StateToFetch), g.state)
	}
	if err := s.ClientRoomserverAPI.QueryLatestEventsAndState(ctx, &more, res); err != nil || g == nil {
		s.note(err)
		return err
	}
	g.asked = true
	res.StateEvents = slices.DeleteFunc(res.StateEvents, func(e *types.HeaderedEvent) bool {
		if e.Type() != g.state.EventType || !e.StateKeyEquals(g.state.StateKey) {
			return false
		}
		g.current = e.PDU
		return !needed
	})
	return nil
}

// QueryCurrentState implements api.QueryEventsAPI. Before Dendrite builds a state event, it queries whether the room already has the same
// state. The roomserver goes through all state of the room for that. A closing event needs no answer: it always differs from its original,
// and the ground shows whether the original was replaced.
func (s *oneSend) QueryCurrentState(
	ctx context.Context, req *api.QueryCurrentStateRequest, res *api.QueryCurrentStateResponse,
) error {
	if s.ground != nil && !s.ground.asked {
		return nil
	}
	err := s.ClientRoomserverAPI.QueryCurrentState(ctx, req, res)
	s.note(err)
	return err
}
