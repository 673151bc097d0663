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
// upon: both come from one answer of the roomserver. It travels in the context of the send, like the hook.
type ground struct {
	state gomatrixserverlib.StateKeyTuple
	// asked: Dendrite has asked upon what to build. current is nil before, and if there is none.
	asked   bool
	current gomatrixserverlib.PDU
}

type groundKey struct{}

// withGround returns a context for sending the closing event of e, and what it is built upon; nil if e is not state.
func withGround(ctx context.Context, e expiration.Event) (context.Context, *ground) {
	s, ok := e.State()
	if !ok {
		return ctx, nil
	}
	g := &ground{state: gomatrixserverlib.StateKeyTuple{EventType: s.Type, StateKey: s.Key}}
	return context.WithValue(ctx, groundKey{}, g), g
}

// QueryLatestEventsAndState implements api.RoomserverInternalAPI. Dendrite asks it upon what to build an event.
func (a *API) QueryLatestEventsAndState(
	ctx context.Context, req *api.QueryLatestEventsAndStateRequest, res *api.QueryLatestEventsAndStateResponse,
) error {
	g, ok := ctx.Value(groundKey{}).(*ground)
	if !ok {
		return a.RoomserverInternalAPI.QueryLatestEventsAndState(ctx, req, res)
	}
	g.asked = true
	needed := slices.Contains(req.StateToFetch, g.state)
	more := *req
	if !needed {
		more.StateToFetch = append(slices.Clip(req.StateToFetch), g.state)
	}
	if err := a.RoomserverInternalAPI.QueryLatestEventsAndState(ctx, &more, res); err != nil {
		return err
	}
	res.StateEvents = slices.DeleteFunc(res.StateEvents, func(e *types.HeaderedEvent) bool {
		if e.Type() != g.state.EventType || !e.StateKeyEquals(g.state.StateKey) {
			return false
		}
		g.current = e.PDU
		return !needed
	})
	return nil
}

// QueryCurrentState implements api.RoomserverInternalAPI. Before Dendrite builds a state event it asks whether the room has
// the same already, for which the roomserver goes through all state of the room. A closing event is never the same as its
// original, and whether that was replaced is seen when it is built: there is nothing to look up.
func (a *API) QueryCurrentState(
	ctx context.Context, req *api.QueryCurrentStateRequest, res *api.QueryCurrentStateResponse,
) error {
	if g, ok := ctx.Value(groundKey{}).(*ground); ok && !g.asked {
		return nil
	}
	return a.RoomserverInternalAPI.QueryCurrentState(ctx, req, res)
}
