// Package around is for routes that answer as Dendrite's own do, with something changed. They are registered before
// Dendrite's, and ask its routes by themselves.
package around

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"

	"github.com/gorilla/mux"
	"github.com/matrix-org/util"
)

// asked marks the context of a request that one of these routes has taken.
type asked struct{}

// First matches all requests but those that Dendrite is asked with. Each of these routes must have it.
func First(req *http.Request, _ *mux.RouteMatch) bool {
	return req.Context().Value(asked{}) == nil
}

// Dendrite returns what Dendrite's route answers. If that is not a success, it is to be passed on, and ok is false.
func Dendrite(router http.Handler, req *http.Request) (answer util.JSONResponse, body []byte, ok bool) {
	kept := buffer{header: http.Header{}, code: http.StatusOK}
	router.ServeHTTP(&kept, req.WithContext(context.WithValue(req.Context(), asked{}, true)))
	body = kept.body.Bytes()
	return util.JSONResponse{Code: kept.code, JSON: json.RawMessage(body)}, body, kept.code == http.StatusOK
}

// buffer keeps an answer.
type buffer struct {
	header http.Header
	code   int
	body   bytes.Buffer
}

func (b *buffer) Header() http.Header         { return b.header }
func (b *buffer) WriteHeader(code int)        { b.code = code }
func (b *buffer) Write(p []byte) (int, error) { return b.body.Write(p) }
