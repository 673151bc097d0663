package dendritefix

import (
	"errors"
	"fmt"
	"io"
	"net/http"

	"github.com/matrix-org/gomatrixserverlib/spec"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/jsondepth"
)

// BoundDepth is a middleware for client routes. It refuses a request if the JSON of its body is nested too deeply.
//
// Dendrite accepts the 10,000 levels that Go decodes, and wraps them in more. An event with 9,993 levels breaks /sync for every user in its
// room. For an event with a few more levels, the roomserver never answers. Many requests carry content (sends, createRoom, to-device
// messages, account data), so all of them are bounded here. The levels are counted while the handler reads the body. The body is not kept.
//
// This file can go when Dendrite bounds the depth of JSON itself.
func BoundDepth(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if req.Body == nil || req.Body == http.NoBody {
			next.ServeHTTP(w, req)
			return
		}
		body := &boundBody{ReadCloser: req.Body}
		req = req.WithContext(req.Context()) // a copy
		req.Body = body
		next.ServeHTTP(&boundWriter{ResponseWriter: w, body: body}, req)
	})
}

// errTooDeep is the error of reading a body that is nested too deeply.
var errTooDeep = errors.New("the JSON is nested too deeply")

// boundBody is a body that can be read up to the point at which it is nested too deeply.
type boundBody struct {
	io.ReadCloser
	depth   jsondepth.Counter
	tooDeep bool
}

func (b *boundBody) Read(p []byte) (int, error) {
	if b.tooDeep {
		return 0, errTooDeep
	}
	n, err := b.ReadCloser.Read(p)
	if b.tooDeep = b.depth.TooDeep(p[:n]); b.tooDeep {
		return 0, errTooDeep
	}
	return n, err
}

// boundWriter replaces the answer to a request whose body is nested too deeply. The handler sees only a body that it cannot read, and
// Dendrite would answer that with 500.
type boundWriter struct {
	http.ResponseWriter
	body              *boundBody
	written, replaced bool
}

// Unwrap is for http.ResponseController.
func (w *boundWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *boundWriter) WriteHeader(code int) {
	if w.written || !w.body.tooDeep {
		w.written = w.written || code >= http.StatusOK
		w.ResponseWriter.WriteHeader(code)
		return
	}
	w.written, w.replaced = true, true
	w.Header().Del("Content-Length")
	refuse(w.ResponseWriter, spec.BadJSON(fmt.Sprintf("The JSON is nested deeper than %d levels", jsondepth.Max)))
}

func (w *boundWriter) Write(p []byte) (int, error) {
	if !w.written {
		w.WriteHeader(http.StatusOK)
	}
	if w.replaced {
		return len(p), nil
	}
	return w.ResponseWriter.Write(p)
}
