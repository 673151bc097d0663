package dendritefix

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/sirupsen/logrus"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/guard"
)

const (
	// levelsLookedAt is the pause between an event and the look at its room. It is needed because the output stream can be ahead of the
	// roomserver's database.
	levelsLookedAt = 5 * time.Second
	// maxLevelsLooks is how many rooms may wait for a look. A room beyond that is not looked at.
	maxLevelsLooks = 1000
)

// QueryCurrentState is the roomserver's query for current state.
type QueryCurrentState = func(context.Context, *api.QueryCurrentStateRequest, *api.QueryCurrentStateResponse) error

// PowerLevels notices rooms that have lost their power levels, and logs an error for each.
//
// When two changes of power levels cross, and neither is the room creator's, the state resolution of Dendrite v0.13.8 can leave the room
// with none. Other servers keep one of the two. From then on only the creator may send state on this server: the state of calls is refused,
// and so are closing and delayed events. This cannot be fixed from outside, so the operator is told. A loss that an event of another type
// causes, for example a merge of two branches, is not noticed.
//
// This file can go when Dendrite's state resolution decides as that of other servers does.
type PowerLevels struct {
	query QueryCurrentState

	mu      sync.Mutex      // guards pending
	pending map[string]bool // the rooms that wait for a look
}

// NewPowerLevels returns a watcher.
func NewPowerLevels(query QueryCurrentState) *PowerLevels {
	return &PowerLevels{query: query, pending: map[string]bool{}}
}

// Watch looks at an event of the roomserver's output stream. It queries the roomserver only if the event changes power levels and did not
// become the current state.
func (p *PowerLevels) Watch(ctx context.Context, output *api.OutputNewRoomEvent) {
	e := output.Event
	if e.Type() != spec.MRoomPowerLevels || !e.StateKeyEquals("") || slices.Contains(output.AddsStateEventIDs, e.EventID()) {
		return
	}
	roomID := e.RoomID().String()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pending[roomID] || len(p.pending) >= maxLevelsLooks {
		return
	}
	p.pending[roomID] = true
	time.AfterFunc(levelsLookedAt, func() {
		p.mu.Lock()
		delete(p.pending, roomID)
		p.mu.Unlock()
		if ctx.Err() == nil {
			guard.Run("looking at power levels", func() { p.look(ctx, roomID) })
		}
	})
}

func (p *PowerLevels) look(ctx context.Context, roomID string) {
	tuple := gomatrixserverlib.StateKeyTuple{EventType: spec.MRoomPowerLevels}
	create := gomatrixserverlib.StateKeyTuple{EventType: spec.MRoomCreate}
	var res api.QueryCurrentStateResponse
	err := p.query(ctx, &api.QueryCurrentStateRequest{
		RoomID: roomID, StateTuples: []gomatrixserverlib.StateKeyTuple{tuple, create},
	}, &res)
	if err != nil || res.StateEvents[tuple] != nil || res.StateEvents[create] == nil { // no create event: no local user is in the room
		return
	}
	logrus.WithField("room_id", roomID).Error(
		"Two changes of power levels crossed, and Dendrite left the room with none: see docs/operations.md",
	)
}
