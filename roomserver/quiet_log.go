package roomserver

import (
	"io"
	"net/http"

	"github.com/matrix-org/util"
	"github.com/sirupsen/logrus"
)

// quiet returns a request whose logger turns errors into debug output once the hook has called the send off. SendEvent logs the hook's
// error as an error, although it means only that a race was lost or a limit was reached.
func (s *oneSend) quiet(req *http.Request) *http.Request {
	entry := util.GetLogger(req.Context())
	relay := &logrus.Logger{
		Out: io.Discard, Formatter: discard{}, Hooks: logrus.LevelHooks{}, Level: entry.Logger.GetLevel(),
	}
	relay.AddHook(&demotion{send: s, to: entry.Logger})
	return req.WithContext(util.ContextWithLogger(req.Context(), relay.WithFields(entry.Data)))
}

// demotion is a logrus hook that passes entries on to another logger, and lowers errors of a send that was called off.
type demotion struct {
	send *oneSend
	to   *logrus.Logger
}

func (d *demotion) Levels() []logrus.Level { return logrus.AllLevels }

func (d *demotion) Fire(e *logrus.Entry) error {
	level := e.Level
	if d.send.hook.Err != nil && level == logrus.ErrorLevel {
		level = logrus.DebugLevel
	}
	d.to.WithFields(e.Data).WithContext(e.Context).WithTime(e.Time).Log(level, e.Message)
	return nil
}

// discard is a formatter for a logger that writes nothing itself.
type discard struct{}

func (discard) Format(*logrus.Entry) ([]byte, error) { return nil, nil }
