package dendritefix

import (
	"context"
	"testing"
	"testing/synctest"

	fsapi "github.com/matrix-org/dendrite/federationapi/api"
	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/stretchr/testify/require"
)

// calls is a roomserver that records the order of its calls.
type calls struct {
	api.RoomserverInternalAPI
	made []string
}

func (c *calls) SetFederationAPI(fsapi.RoomserverFederationAPI, *gomatrixserverlib.KeyRing) {
	c.made = append(c.made, "ready")
}

func (c *calls) QueryEventsByID(context.Context, *api.QueryEventsByIDRequest, *api.QueryEventsByIDResponse) error {
	c.made = append(c.made, "query")
	return nil
}

// Dendrite's roomserver cannot answer before it has the federation API.
func TestQueriesWaitForTheRoomserver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &calls{}
		wrapper := NewReady(c)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		require.ErrorIs(t, wrapper.QueryEventsByID(ctx, nil, nil), context.Canceled)
		answered := make(chan error, 1)
		go func() { answered <- wrapper.QueryEventsByID(t.Context(), nil, nil) }()
		synctest.Wait()
		wrapper.SetFederationAPI(nil, nil)
		require.NoError(t, <-answered)
		require.Equal(t, []string{"ready", "query"}, c.made)
	})
}
