package clientapi

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/sirupsen/logrus"
	"github.com/stretchr/testify/require"
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
