package roomserver

import (
	"context"
	"slices"

	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/gomatrixserverlib"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// ground is the current state in the place of a closing event, as it is after the events that the closing event is built
// upon: both come from one answer of the roomserver.
type ground struct {
	state gomatrixserverlib.StateKeyTuple
	// asked: Dendrite has asked upon what to build. current is nil before, and if there is none.
	asked   bool
	current gomatrixserverlib.PDU
}

// newGround returns what the closing event of e will be built upon, or nil if e is not state.
func newGround(e expiration.Event) *ground {
	s, ok := e.State()
	if !ok {
		return nil
	}
	return &ground{state: gomatrixserverlib.StateKeyTuple{EventType: s.Type, StateKey: s.Key}}
}

// QueryLatestEventsAndState implements api.QueryLatestEventsAndStateAPI. Dendrite asks it upon what to build an event.
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

// QueryCurrentState implements api.QueryEventsAPI. Before Dendrite builds a state event it asks whether the room has the same already,
// for which the roomserver goes through all state of the room. A closing event is never the same as its original, and whether
// that was replaced is seen when it is built: there is nothing to look up.
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
