package clientapi

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/getsentry/sentry-go"
	sentryhttp "github.com/getsentry/sentry-go/http"
	"github.com/sirupsen/logrus"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// A delay ID is a secret: it must not appear in a log.
func TestDelayIDsAreNotLogged(t *testing.T) {
	var log strings.Builder
	defer logrus.SetLevel(logrus.GetLevel())
	defer logrus.SetOutput(logrus.StandardLogger().Out)
	logrus.SetOutput(&log)
	logrus.SetLevel(logrus.TraceLevel)
	p := &planner{err: errors.New("disk full")}
	for _, path := range []string{stablePath, unstablePath} {
		events := path + "/delayed_events/" + delayID
		do(newPlanned(p, 1), "POST", events+"/restart", "{}", true)
		do(newPlanned(p, 1), "POST", events, `{"action":"restart"}`, true)
		do(newPlanned(p, 1), "GET", events, "", true)
		do(newPlanned(p, 1), "GET", path+"/delayed_events?delay_id="+delayID, "", true)
		do(newPlanned(p, 1), "POST", events+"/"+delayID, "{}", true)
		do(newPlanned(p, 1), "POST", path+"/delayed_events/restart/"+delayID, "{}", true)
		// The same with escapes in the path.
		spelled := path + "/delayed_events/" + fmt.Sprintf("%%%02x", delayID[0]) + delayID[1:]
		for _, action := range []string{"/restart", "/rest%61rt", ""} {
			do(newPlanned(p, 1), "POST", spelled+action, `{"action":"restart"}`, true)
			do(newPlanned(p, 1), "GET", spelled+action, "", true)
			do(newPlanned(p, 1), "OPTIONS", spelled+action, "", true)
		}
	}
	logrus.SetOutput(io.Discard)
	require.Contains(t, log.String(), "disk full")
	require.NotContains(t, log.String(), delayID[1:])
}

// reports is a Sentry transport that keeps what is sent.
type reports struct{ sent []*sentry.Event }

func (r *reports) Flush(time.Duration) bool       { return true }
func (r *reports) Configure(sentry.ClientOptions) {}
func (r *reports) SendEvent(e *sentry.Event)      { r.sent = append(r.sent, e) }

// Nor must a delay ID appear in a report to Sentry.
func TestDelayIDsAreNotReported(t *testing.T) {
	logrus.SetOutput(io.Discard)
	defer logrus.SetOutput(os.Stderr)
	for path, method := range map[string]string{
		unstablePath + "/delayed_events?delay_id=" + delayID:       "GET",
		stablePath + "/delayed_events/" + delayID:                  "GET",
		stablePath + "/delayed_events/" + delayID + "/restart?a=b": "POST",
	} {
		r := &reports{}
		client, err := sentry.NewClient(sentry.ClientOptions{Transport: r})
		require.NoError(t, err)
		p := &planner{err: errors.New("disk full"), events: make([]expiration.DelayedEvent, 1)}
		handler := sentryhttp.New(sentryhttp.Options{}).Handle(newPlanned(p, 1)) // as Dendrite does
		req := httptest.NewRequest(method, path, nil)
		req.Header.Set("Authorization", "Bearer token")
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, req.WithContext(sentry.SetHubOnContext(req.Context(), sentry.NewHub(client, sentry.NewScope()))))
		require.Equal(t, http.StatusInternalServerError, w.Code, path)
		require.Len(t, r.sent, 1, path)
		report, err := json.Marshal(r.sent[0])
		require.NoError(t, err)
		require.Contains(t, string(report), `"url":"http://example.com/_matrix/client/`)
		require.NotContains(t, string(report), delayID, path)
	}
}
