package dendritefix

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/sirupsen/logrus"
	logs "github.com/sirupsen/logrus/hooks/test"
	"github.com/stretchr/testify/require"
)

// levels is a roomserver with the current state of one room, by type. It counts its queries.
type levels struct {
	types []string
	asked int
	panic bool
}

func (l *levels) QueryCurrentState(_ context.Context, _ *api.QueryCurrentStateRequest, res *api.QueryCurrentStateResponse) error {
	l.asked++
	if l.panic {
		panic("in a query")
	}
	res.StateEvents = map[gomatrixserverlib.StateKeyTuple]*types.HeaderedEvent{}
	for _, eventType := range l.types {
		res.StateEvents[gomatrixserverlib.StateKeyTuple{EventType: eventType}] = &types.HeaderedEvent{}
	}
	return nil
}

func TestLostPowerLevels(t *testing.T) {
	const create, power = "m.room.create", "m.room.power_levels"
	for name, test := range map[string]struct {
		eventType string
		adds      []string
		state     levels
		asked     int
		lost      bool
	}{
		"lost":                    {power, nil, levels{types: []string{create}}, 1, true},
		"lost to the other":       {power, nil, levels{types: []string{create, power}}, 1, false},
		"became the state":        {power, []string{"$event"}, levels{types: []string{create}}, 0, false},
		"another type":            {"m.room.topic", nil, levels{types: []string{create}}, 0, false},
		"the room is gone":        {power, nil, levels{}, 1, false},
		"the roomserver panicked": {power, nil, levels{panic: true}, 1, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				said := logs.NewGlobal()
				defer logrus.StandardLogger().ReplaceHooks(logrus.LevelHooks{})
				p := NewPowerLevels(test.state.QueryCurrentState)
				event := newEvent(t, "$event", "@alice:example.org", "10", fmt.Sprintf(`"type":%q,"state_key":"","content":{}`, test.eventType))
				for range 3 { // one look for all of them
					p.Watch(t.Context(), &api.OutputNewRoomEvent{Event: &types.HeaderedEvent{PDU: event}, AddsStateEventIDs: test.adds})
				}
				time.Sleep(levelsLookedAt)
				synctest.Wait()
				require.Equal(t, test.asked, test.state.asked)
				require.Empty(t, p.pending)
				lost := said.LastEntry() != nil && said.LastEntry().Data["room_id"] == "!room:example.org" && !test.state.panic
				require.Equal(t, test.lost, lost)
			})
		})
	}
}
