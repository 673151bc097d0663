package dendritefix

import (
	"context"
	"encoding/json"
	"net/http"
	"strings"

	"github.com/matrix-org/gomatrixserverlib/spec"
)

// RefuseUnfinishedSync is a middleware for client routes. It answers a /sync whose request was cancelled with 503.
//
// A server that stops cancels its requests. In Dendrite a /sync that can then read no events any more is answered all the same, with 200 and
// a next_batch behind the events that it could not read. The client never gets these events.
//
// This file can go when Dendrite answers such a /sync with an error.
func RefuseUnfinishedSync(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if strings.HasSuffix(req.URL.Path, "/sync") {
			w = &syncWriter{ResponseWriter: w, ctx: req.Context()}
		}
		next.ServeHTTP(w, req)
	})
}

// syncWriter writes the answer to a /sync.
type syncWriter struct {
	http.ResponseWriter
	ctx            context.Context // of the request
	begun, refused bool
}

func (w *syncWriter) WriteHeader(code int) {
	if w.begun {
		return
	}
	w.begun = true
	if code != http.StatusOK || w.ctx.Err() == nil {
		w.ResponseWriter.WriteHeader(code)
		return
	}
	w.refused = true
	w.Header().Del("Content-Length")
	w.Header().Set("Content-Type", "application/json")
	w.ResponseWriter.WriteHeader(http.StatusServiceUnavailable)
	_ = json.NewEncoder(w.ResponseWriter).Encode(spec.Unknown("The server is stopping"))
}

func (w *syncWriter) Write(data []byte) (int, error) {
	if w.WriteHeader(http.StatusOK); w.refused {
		return len(data), nil
	}
	return w.ResponseWriter.Write(data)
}

// Unwrap is for http.ResponseController.
func (w *syncWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }
