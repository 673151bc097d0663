package clientapi

import (
	"net/http"
	"testing"

	"github.com/stretchr/testify/require"
)

// If the user API cannot tell whose access token it is, a request is answered as after any other fault of the server's. An unstable action
// needs no access token, so it is done.
func TestAccessTokensCannotBeLookedUp(t *testing.T) {
	handler := newPlanned(&planner{}, 1)
	for _, request := range [][3]string{
		{http.MethodPut, "/_matrix/client/v3/rooms/!room:localhost/delayed_event/m/txn", `{"delay_ms":5,"content":{}}`},
		{http.MethodPut, "/_matrix/client/v3/rooms/!room:localhost/send/m/txn?org.matrix.msc4140.delay=5", `{}`},
		{http.MethodPost, stablePath + "/delayed_events/" + delayID + "/restart", ""},
		{http.MethodGet, stablePath + "/delayed_events/" + delayID, ""},
		{http.MethodGet, unstablePath + "/delayed_events", ""},
	} {
		w := doWith(handler, request[0], request[1], request[2], "away")
		require.Equal(t, http.StatusInternalServerError, w.Code, request)
		require.JSONEq(t, `{"errcode":"M_UNKNOWN","error":"Internal server error"}`, w.Body.String(), request)
	}
	require.Equal(t, http.StatusOK, doWith(handler, http.MethodPost, unstablePath+"/delayed_events/"+delayID+"/restart", "", "away").Code)
}
