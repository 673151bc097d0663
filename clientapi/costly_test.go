package clientapi

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/matrix-org/dendrite/setup/config"
	userapi "github.com/matrix-org/dendrite/userapi/api"
	"github.com/matrix-org/util"
	"github.com/stretchr/testify/require"
)

// All costly requests of a user share one limit. Requests of an application service do not count.
func TestRequestsOfAUserAreLimited(t *testing.T) {
	a := New(Config{MaxDelay: time.Hour, UserRequests: twice}, &config.ClientAPI{}, rooms{}, Timers{})
	alice, bob := &userapi.Device{UserID: "@alice:localhost"}, &userapi.Device{UserID: "@bob:localhost"}
	service := &userapi.Device{UserID: "@alice:localhost", AccountType: userapi.AccountTypeAppService}
	for _, device := range []*userapi.Device{alice, alice, bob, service} {
		done, err := a.begin(httptest.NewRequest(http.MethodGet, "/", nil), device)
		require.NoError(t, err)
		done()
	}
	req := httptest.NewRequest(http.MethodPut, "/?org.matrix.msc4140.delay=1", strings.NewReader("{}"))
	txnID := "txn"
	for name, res := range map[string]util.JSONResponse{
		"schedule": a.send(req, alice, target{roomID: "!room:localhost", eventType: "m", txnID: &txnID}),
		"list":     a.list(req, alice, unstable),
		"look up":  a.look(req, alice, stable, "id"),
	} {
		require.Equal(t, http.StatusTooManyRequests, res.Code, name)
		require.Equal(t, "1800", res.Headers["Retry-After"], name)
	}
}
